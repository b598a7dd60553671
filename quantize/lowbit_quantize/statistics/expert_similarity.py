"""How near a layer's routed experts are to each other, on a sample of what their router reads, and what their block
makes of it for them: most give experts the same, some a latent of it.

- `router`: the cosine of two experts' router logits over the tokens (M-SMoE, Li et al. 2023, arXiv 2310.01334)
- `output`: minus the squared distance of their outputs, summed over the tokens; HC-SMoE (Chen et al. 2024,
  arXiv 2410.08589) compares the outputs' means, which hides that experts differ in what they give for one token
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit_quantize.model.experts.linears import Experts, expert_outputs

CHUNK_VALUES = 1 << 25  # tokens · experts · hidden whose outputs are held at once


def router_nearness(router: Any, experts: Experts, inputs: Tensor, given: Tensor) -> Tensor:
    """(experts, experts), larger is nearer, from what the router reads, (tokens, hidden)."""
    bias = getattr(router, "bias", None)
    logits = functional.linear(inputs.float(), router.weight.float(), None if bias is None else bias.float())
    of_unit_length = functional.normalize(logits, dim=0)
    return (of_unit_length.T @ of_unit_length).double().cpu()


def output_nearness(router: nn.Module, experts: Experts, inputs: Tensor, given: Tensor) -> Tensor:
    """(experts, experts), larger is nearer, from what experts are called with, (tokens, width)."""
    products = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for rows in given.split(max(1, CHUNK_VALUES // (len(experts) * inputs.shape[1]))):
        outputs = (
            expert_outputs(experts, rows).float().transpose(0, 1).flatten(1)
        )  # (experts, tokens · hidden)
        products += (outputs @ outputs.T).double().cpu()
    norms = products.diagonal()
    return 2 * products - norms - norms.unsqueeze(1)


NEARNESS: dict[str, Callable[[nn.Module, Experts, Tensor, Tensor], Tensor]] = {
    "router": router_nearness,
    "output": output_nearness,
}
