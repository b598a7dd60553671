"""How much each routed expert matters: what routing showed of it on the calibration text, and scores made of that.

One pass over the calibration tokens serves every criterion. With T_j the tokens routed to expert j, g its gate and
f its output:

- `reap`: mean over T_j of g·‖f‖ (Lasby et al. 2025, arXiv 2510.13999); `gated-norm`: its sum
- `man`: mean over T_j of ‖f‖ (arXiv 2606.15716); `ean`: its sum
- `frequency`: |T_j|; `random`: a control

Experts whose outputs run away ("super-experts", Su et al. 2025, arXiv 2507.23279) carry the attention sinks of a
model however rarely they are used.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_quantize.model.architecture import Architecture, kind_of
from lowbit_quantize.model.decoder import Decoder
from lowbit_quantize.model.hooks import inputs_of
from lowbit_quantize.statistics.sample import Sample

SUPER_RATIO = 10.0  # largest output of a super-expert, in medians of its layer


class ExpertSaliency:
    """What routing showed of each expert of one layer; every field is (experts,), float64."""

    def __init__(self, experts: int) -> None:
        self.tokens, self.norms, self.gated_norms, self.largest = torch.zeros(4, experts, dtype=torch.float64)

    def observe(self, expert: int, outputs: Tensor, gates: Tensor) -> None:
        """Add the outputs (tokens, hidden) and gates (tokens,) of one expert."""
        norms = outputs.float().norm(dim=-1).double()
        self.tokens[expert] += len(outputs)
        self.norms[expert] += norms.sum().cpu()
        self.gated_norms[expert] += (norms * gates.double()).sum().cpu()
        self.largest[expert] = max(self.largest[expert], outputs.abs().max().double().cpu())

    @property
    def super_experts(self) -> Tensor:
        """Which experts have outputs far beyond their layer's, (experts,) bool."""
        found: Tensor = self.largest > SUPER_RATIO * self.largest.median()
        return found


CRITERIA: dict[str, Callable[[ExpertSaliency], Tensor]] = {
    "reap": lambda seen: seen.gated_norms / seen.tokens.clamp(min=1),
    "gated-norm": lambda seen: seen.gated_norms,
    "man": lambda seen: seen.norms / seen.tokens.clamp(min=1),
    "ean": lambda seen: seen.norms,
    "frequency": lambda seen: seen.tokens,
}


def score(seen: ExpertSaliency, criterion: str, seed: int, layer: int) -> Tensor:
    """Scores of a layer's experts, (experts,): those with the highest are kept."""
    if criterion == "random":
        generator = torch.Generator().manual_seed(1_000_003 * seed + layer)
        return torch.rand(len(seen.tokens), generator=generator, dtype=torch.float64)
    return CRITERIA[criterion](seen)


def see_routing(
    decoder: Decoder,
    layer: nn.Module,
    index: int,
    hidden: Tensor,
    seen: ExpertSaliency,
    inputs: Sample | None = None,
) -> None:
    """Gather what routing shows on hidden states of a layer whose experts are visited, and a sample of the router's
    inputs where asked; the hidden states stay.
    """
    kind = kind_of(layer)
    experts: Any = layer.get_submodule(kind.experts)
    with experts.recording() as calls, inputs_of(layer, {kind.router: inputs.add} if inputs else {}):
        for _ in decoder.run_layer(layer, index, hidden):
            pass
    with torch.no_grad():
        for number, expert in enumerate(experts):
            for call in calls:
                tokens, gates = call.of(number)
                if len(tokens):
                    seen.observe(number, expert(call.hidden[tokens]), gates)
    experts.let_go()


@contextmanager
def routing_of(
    layer: nn.Module, architecture: Architecture, seen: ExpertSaliency, inputs: Sample | None = None
) -> Iterator[None]:
    """Gather what routing shows, and a sample of the router's inputs where asked, while the layer runs."""
    experts: Any = layer.get_submodule(architecture.experts)
    experts.observer = seen.observe
    with inputs_of(layer, {architecture.router: inputs.add} if inputs else {}):
        yield
    experts.observer = None
