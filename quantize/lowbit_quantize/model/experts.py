"""Routed experts as plain linears, observed where their block calls them with hidden states, indices and gates.

transformers holds a layer's experts as two stacked tensors. Here they are a list of small gated networks, named
as published checkpoints name them, so that the walk treats an expert's linears like any others.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Called with an expert's number, its outputs (tokens, hidden) and its gates (tokens,).
ExpertObserver = Callable[[int, Tensor, Tensor], None]


class Expert(nn.Module):
    """One gated network: `down(act(gate(x)) · up(x))`."""

    def __init__(self, hidden: int, intermediate: int, activation: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False, device="meta")
        self.up_proj = nn.Linear(hidden, intermediate, bias=False, device="meta")
        self.down_proj = nn.Linear(intermediate, hidden, bias=False, device="meta")
        self.act_fn = activation

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.middle(inputs))
        return output

    def middle(self, inputs: Tensor) -> Tensor:
        """What the last linear reads: (tokens, hidden) to (tokens, intermediate)."""
        product: Tensor = self.act_fn(self.gate_proj(inputs)) * self.up_proj(inputs)
        return product


class ExpertList(nn.ModuleList):
    """The routed experts of one block; called as transformers' stacked experts are."""

    observer: ExpertObserver | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of gate · output over each token's experts: (tokens, hidden), (tokens, k), (tokens, k)."""
        parts = hidden_states.new_zeros(
            *top_k_index.shape,
            hidden_states.shape[-1],
            dtype=torch.promote_types(hidden_states.dtype, top_k_weights.dtype),
        )
        for number, expert in enumerate(self):
            token, place = torch.where(top_k_index == number)
            if not len(token):
                continue
            output, gates = expert(hidden_states[token]), top_k_weights[token, place]
            if self.observer is not None:
                self.observer(number, output, gates)
            parts[token, place] = output * gates.unsqueeze(-1)
        return parts.sum(1).to(hidden_states.dtype)


def unstack_experts(layer: nn.Module, name: str) -> None:
    """Put an `ExpertList` without weights in the place of a layer's stacked experts."""
    stacked: Any = layer.get_submodule(name)
    experts, two_intermediate, hidden = stacked.gate_up_proj.shape
    block, _, leaf = name.rpartition(".")
    every = (Expert(hidden, two_intermediate // 2, stacked.act_fn) for _ in range(experts))
    setattr(layer.get_submodule(block), leaf, ExpertList(every))


def expert_outputs(experts: ExpertList, inputs: Tensor) -> Tensor:
    """What every expert gives for every token: (tokens, hidden) to (tokens, experts, hidden)."""
    with torch.no_grad():
        return torch.stack([expert(inputs) for expert in experts], dim=1)


def mixture(router: nn.Module, inputs: Tensor, outputs: Tensor) -> Tensor:
    """The routed part of a block's output, (tokens, hidden), from all its experts' outputs as above; float32."""
    _, gates, chosen = router(inputs)  # (tokens, k), (tokens, k)
    picked = outputs[torch.arange(len(outputs), device=outputs.device).unsqueeze(1), chosen]
    mixed: Tensor = (picked.float() * gates.float().unsqueeze(-1)).sum(1)
    return mixed
