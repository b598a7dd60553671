"""How a layer's block routes: what configurations call its sizes, whom it sends tokens to, and what is left of it.

Families differ in who routes: the router itself, or the block that holds it, by a bias of its own. So nobody here calls
a router: the block runs until it calls its experts.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_core.errors import ModelError
from lowbit_quantize.model.architecture import LayerKind
from lowbit_quantize.model.experts.visited import RoutedCall

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
USED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
ATTRIBUTES = ("num_experts", "out_features")  # where modules keep the count


@dataclass(frozen=True)
class RoutingGroups:
    """Into how many groups a router divides its experts, how many of them a token's experts lie in, and by how many of
    its experts a group is chosen.
    """

    groups: int = 1
    used: int = 1
    choosers: int = 1


def routing_groups(config: Any) -> RoutingGroups:
    """As transformers' routers read a configuration.

    DeepSeek-V2's have groups by a method that they name; those of V3 and its kin, which know no other method, wherever
    there is more than one group, and they choose a group by the sum of its two best experts.
    """
    groups, method = getattr(config, "n_group", None) or 1, getattr(config, "topk_method", None)
    if groups == 1 or method == "greedy":
        return RoutingGroups()
    return RoutingGroups(groups, config.topk_group, choosers=1 if method == "group_limited_greedy" else 2)


def expert_count(config: Any) -> tuple[int, tuple[str, ...]]:
    """How many routed experts a layer has, and the keys of a configuration that say so.

    Raises ModelError where none says it, or two say different things.
    """
    held = {name: value for name in COUNTS if isinstance(value := vars(config).get(name), int)}
    if len(set(held.values())) != 1:
        said = ", ".join(f"{name} = {value}" for name, value in held.items()) or "none"
        raise ModelError(
            f"the configuration does not say in one way how many experts a layer has ({said}; looked for: "
            f"{', '.join(COUNTS)}); experts of this family cannot be pruned"
        )
    return next(iter(held.values())), tuple(held)


def experts_used(config: Any) -> int:
    """How many experts a token uses; raises ModelError where the configuration does not say."""
    found = next((value for name in USED if isinstance(value := vars(config).get(name), int)), None)
    if found is None:
        raise ModelError(
            f"no key of the configuration says how many experts a token uses (looked for: {', '.join(USED)}); "
            "experts of this family cannot be pruned"
        )
    return found


class _Called(Exception):
    """The block has called its experts."""


class _Experts(nn.Module):
    """Stands where experts were, and sees what they are called with; nobody reads the rest of the block."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        raise _Called(RoutedCall(hidden_states, top_k_index, top_k_weights))


class Routing(nn.Module):
    """A copy of a layer's block without its experts: gives for tokens (tokens, hidden) what experts are called with.

    The tokens may be what the router reads, which some blocks give it in float32.
    """

    def __init__(self, layer: nn.Module, kind: LayerKind) -> None:
        super().__init__()
        block, experts = layer.get_submodule(kind.moe_block), layer.get_submodule(kind.experts)
        self.block = copy.deepcopy(block, {id(experts): _Experts()})
        self._router = kind.router.removeprefix(f"{kind.moe_block}.")
        largest = max(layer.parameters(), key=nn.Parameter.numel)
        self.register_buffer("_typed", torch.empty(0, dtype=largest.dtype), persistent=False)

    @property
    def router(self) -> Any:
        """The module that has a row for each expert."""
        return self.block.get_submodule(self._router)

    def typed(self, inputs: Tensor) -> Tensor:
        """Tokens in the type that the block computes in."""
        typed: Any = self._typed
        return inputs.to(typed.dtype)

    def forward(self, inputs: Tensor) -> RoutedCall:
        try:
            self.block(self.typed(inputs).unsqueeze(0))
        except _Called as called:
            found: RoutedCall = called.args[0]
            return found
        raise AssertionError("the block has not called its experts")

    def leave(self, kept: Tensor) -> "Routing":
        """The same with the `kept` experts only, in this order."""
        leave_of(self.block, self.router, len(self.router.weight), kept)
        return self


def leave_of(block: nn.Module, router: nn.Module, experts: int, kept: Tensor) -> None:
    """Cut the kept of so many experts out of a router, and out of what the block holds itself."""
    for module in (block, *router.modules()):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or experts not in tensor.shape:
                continue
            rows = tensor.detach().index_select(tensor.shape.index(experts), kept.to(tensor.device)).clone()
            is_parameter = name in module._parameters
            setattr(module, name, nn.Parameter(rows, requires_grad=False) if is_parameter else rows)
        for name in ATTRIBUTES:
            if vars(module).get(name) == experts:
                setattr(module, name, len(kept))


def routed_sum_of(call: RoutedCall, outputs: Tensor) -> Tensor:
    """The routed part of a block's output, (tokens, hidden), from what all its experts give for the tokens that it
    calls them with, (tokens, experts, hidden); float32.
    """
    tokens = torch.arange(len(outputs), device=outputs.device).unsqueeze(1)
    mixed: Tensor = (outputs[tokens, call.chosen].float() * call.gates.float().unsqueeze(-1)).sum(1)
    return mixed
