"""Which experts a layer keeps: scored on what routing showed, chosen evenly, cut out of router and block together.

One pass over the calibration tokens serves every criterion. With T_j the tokens routed to expert j, g its gate and
f its output:

- `reap`: mean over T_j of g·‖f‖ (Lasby et al. 2025, arXiv 2510.13999); `gated-norm`: its sum
- `man`: mean over T_j of ‖f‖ (arXiv 2606.15716); `ean`: its sum
- `frequency`: |T_j|; `random`: a control

Experts whose outputs run away ("super-experts", Su et al. 2025, arXiv 2507.23279) carry the attention sinks of a
model however rarely they are used; they are kept whatever their score.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_core.errors import ModelError, RecipeError
from lowbit_quantize.architectures import Architecture
from lowbit_quantize.observe import Sample
from lowbit_quantize.recipe import Experts
from lowbit_quantize.stream import inputs_of

SUPER_RATIO = 10.0  # largest output of a super-expert, in medians of its layer


class ExpertStatistics:
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


CRITERIA: dict[str, Callable[[ExpertStatistics], Tensor]] = {
    "reap": lambda seen: seen.gated_norms / seen.tokens.clamp(min=1),
    "gated-norm": lambda seen: seen.gated_norms,
    "man": lambda seen: seen.norms / seen.tokens.clamp(min=1),
    "ean": lambda seen: seen.norms,
    "frequency": lambda seen: seen.tokens,
}


def score(seen: ExpertStatistics, criterion: str, seed: int, layer: int) -> Tensor:
    """Scores of a layer's experts, (experts,): those with the highest are kept."""
    if criterion == "random":
        generator = torch.Generator().manual_seed(1_000_003 * seed + layer)
        return torch.rand(len(seen.tokens), generator=generator, dtype=torch.float64)
    return CRITERIA[criterion](seen)


def choose(scores: Tensor, protected: Tensor, kept: int, groups: int) -> Tensor:
    """Numbers of the `kept` best experts in rising order, as many from each group; the protected come first."""
    ranked = torch.where(protected, torch.inf, scores).view(groups, -1)
    best = ranked.topk(kept // groups, dim=1).indices + torch.arange(groups).unsqueeze(1) * ranked.shape[1]
    return best.flatten().sort().values


def pruned_router(router: nn.Module, kept: Tensor) -> nn.Module:
    """A copy of a router that knows the kept experts only: its rows, and those of its biases and buffers."""
    pruned: Any = copy.deepcopy(router)
    before = pruned.num_experts
    for name, parameter in list(pruned.named_parameters(recurse=False)):
        if parameter.shape[:1] == (before,):
            setattr(pruned, name, nn.Parameter(parameter[kept].clone(), requires_grad=False))
    for name, buffer in list(pruned.named_buffers(recurse=False)):
        if buffer.shape[:1] == (before,):
            setattr(pruned, name, buffer[kept].clone())
    pruned.num_experts = len(kept)
    return pruned  # type: ignore[no-any-return]


def prune_layer(layer: nn.Module, architecture: Architecture, kept: Tensor) -> None:
    """Remove all other experts from a layer, and their rows from everything its router holds."""
    block: Any = layer.get_submodule(architecture.moe_block)
    experts: Any = layer.get_submodule(architecture.experts)
    block.gate = pruned_router(block.gate, kept)
    block.experts = type(experts)(experts[int(i)] for i in kept)


@contextmanager
def routing_of(
    layer: nn.Module, architecture: Architecture, seen: ExpertStatistics, inputs: Sample
) -> Iterator[None]:
    """Gather what routing shows, and a sample of the router's inputs, while the layer runs."""
    experts: Any = layer.get_submodule(architecture.experts)
    experts.observer = seen.observe
    with inputs_of(layer, {architecture.router: inputs.add}):
        yield
    experts.observer = None


@dataclass(frozen=True)
class Pruning:
    """A checked decision: of `experts` in every routed layer, `kept` stay, evenly over `groups`."""

    experts: int
    kept: int
    groups: int
    recipe: Experts

    def keep(self, seen: ExpertStatistics, layer: int) -> Tensor:
        """The numbers of the experts that a layer keeps, rising."""
        scores = score(seen, self.recipe.criterion, self.recipe.seed, layer)
        return choose(scores, seen.super_experts, self.kept, self.groups)


def plan_pruning(config: Any, architecture: Architecture, recipe: Experts, model: str) -> Pruning | None:
    """Check a recipe's `experts` against a model's configuration; raises RecipeError or ModelError."""
    if recipe.prune == 0:
        if recipe.router_distillation:
            raise RecipeError(
                "experts.router_distillation = true makes up for pruned experts; set experts.prune too"
            )
        return None
    if not architecture.moe_block:
        raise RecipeError(
            f"experts.prune = {recipe.prune}: {model} ({architecture.model_type}) has no experts"
        )
    experts, top_k = int(config.num_experts), int(config.num_experts_per_tok)
    groups, used = 1, 1
    if getattr(config, "topk_method", None) == "group_limited_greedy":
        groups, used = int(config.n_group), int(config.topk_group)
    kept = recipe.prune if isinstance(recipe.prune, int) else round(experts * (1 - recipe.prune))
    step = math.lcm(groups, recipe.expert_parallel)
    least = next(n for n in range(step, step * (top_k + 1) + 1, step) if n // groups * used >= top_k)
    allowed = ", ".join(str(n) for n in range(least, experts + 1, step)) or "none"
    asked = f"experts.prune = {recipe.prune} keeps {kept} of {experts} experts"
    if kept > experts:
        raise RecipeError(f"{asked}; allowed counts: {allowed}")
    if kept // groups * used < top_k:
        raise RecipeError(f"{asked}, and each token uses {top_k}; allowed counts: {allowed}")
    if kept % groups:
        raise RecipeError(
            f"{asked}, which its {groups} routing groups do not divide; allowed counts: {allowed}"
        )
    if kept % recipe.expert_parallel:
        raise RecipeError(
            f"{asked}, which experts.expert_parallel = {recipe.expert_parallel} does not divide; "
            f"allowed counts: {allowed}"
        )
    if experts % groups:
        raise ModelError(f"{model}: its {groups} routing groups do not divide its {experts} experts")
    return Pruning(experts, kept, groups, recipe)
