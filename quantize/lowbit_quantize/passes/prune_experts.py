"""Expert pruning: which experts a layer keeps, cut out of router and block together; the others are dropped or merged.

Experts are scored on what routing showed (statistics/expert_saliency.py) and chosen evenly over routing groups;
super-experts are kept whatever their score. Scores are taken on what the compressed layers before really give.
With `consolidate` those that stay absorb those that go first (merge_experts.py); the checkpoint has the same form.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lowbit_core.documents import Section
from lowbit_core.errors import ModelError, RecipeError
from lowbit_quantize.model.architecture import Architecture, kind_of
from lowbit_quantize.model.experts.linears import Experts
from lowbit_quantize.model.experts.routing import (
    Routing,
    RoutingGroups,
    expert_count,
    experts_used,
    leave_of,
    routing_groups,
)
from lowbit_quantize.model.experts.visited import VisitedExperts
from lowbit_quantize.passes.kind import PlainPass
from lowbit_quantize.passes.merge_experts import Consolidation, absorbers, merge_experts
from lowbit_quantize.statistics.expert_saliency import ExpertSaliency, score, see_routing
from lowbit_quantize.statistics.expert_similarity import NEARNESS
from lowbit_quantize.statistics.sample import Sample
from lowbit_quantize.walk.layer import LayerContext

NAME = "prune_experts"
MERGING_TOKENS = 4096  # of a block's inputs, on which its experts are compared
DEFAULT_SIMILARITY = "output"


class PruneExpertsOptions(Section):
    """How many routed experts of each layer go, as a ratio, or stay, as a count: one of the two.

    `expert_parallel` must divide what stays; `seed` is for the criterion `random`. With `consolidate`
    experts that go are averaged into the nearest that stay, by `similarity`, as they are or with their neurons aligned.
    """

    prune_ratio: float | None = Field(default=None, ge=0, lt=1, strict=True)  # strict: true is no number
    keep_experts: int | None = Field(default=None, ge=1, strict=True)
    criterion: Literal["reap", "gated-norm", "man", "ean", "frequency", "random"] = "reap"
    seed: int = 0
    expert_parallel: int = Field(default=1, ge=1)
    consolidate: Consolidation | None = None
    similarity: Literal["router", "output"] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> "PruneExpertsOptions":
        if (self.prune_ratio is None) == (self.keep_experts is None):
            raise ValueError(
                "give prune_ratio, the share of experts that goes, or keep_experts, the count that stays"
            )
        if self.similarity and not self.consolidate:
            raise ValueError(
                "similarity says which experts are merged; give consolidate too: average or permute"
            )
        return self

    @property
    def nearness(self) -> str:
        """By what experts that are merged are near to each other."""
        return self.similarity or DEFAULT_SIMILARITY


def choose(scores: Tensor, protected: Tensor, kept: int, groups: int) -> Tensor:
    """Numbers of the `kept` best experts in rising order, as many from each group; the protected come first."""
    ranked = torch.where(protected, torch.inf, scores).view(groups, -1)
    best = ranked.topk(kept // groups, dim=1).indices + torch.arange(groups).unsqueeze(1) * ranked.shape[1]
    return best.flatten().sort().values


def prune_layer(layer: nn.Module, architecture: Architecture, kept: Tensor) -> None:
    """Remove all other experts from a layer, and what its block holds for them to route."""
    experts: Any = layer.get_submodule(architecture.experts)
    numbers = kept.tolist()
    leave_of(
        layer.get_submodule(architecture.moe_block),
        layer.get_submodule(architecture.router),
        len(experts),
        kept,
    )
    if isinstance(experts, VisitedExperts):
        layer.set_submodule(architecture.experts, experts.only(numbers))
    else:
        layer.set_submodule(architecture.experts, type(experts)(experts[number] for number in numbers))


@dataclass(frozen=True)
class PruneExperts(PlainPass):
    """A checked decision: of `experts` in every routed layer, `kept` stay, evenly over `groups`."""

    experts: int
    kept: int
    groups: int
    keys: tuple[str, ...]  # of the configuration, which say how many there are
    recipe: PruneExpertsOptions
    architecture: Architecture

    name = NAME

    def run(self, layer: nn.Module, context: LayerContext) -> None:
        if not self.architecture.has_experts(layer):
            return
        seen, inputs = ExpertSaliency(self.experts), Sample(MERGING_TOKENS)
        merging = inputs if self.recipe.consolidate else None
        see_routing(context.decoder, layer, context.index, context.calibration, seen, merging)
        kept = self.keep(seen, context.index)
        if self.recipe.consolidate:
            experts: Any = layer.get_submodule(self.architecture.experts)
            router = layer.get_submodule(self.architecture.router)
            given = Routing(layer, kind_of(layer))(inputs.rows()).hidden
            context.result.absorbed_by, merged = self.merge(router, experts, kept, seen, inputs.rows(), given)
            for number, parameters in merged:
                experts.replace(number, parameters)
        prune_layer(layer, self.architecture, kept)
        result = context.result
        result.kept_experts, result.expert_tokens = kept.tolist(), seen.tokens.int().tolist()
        result.saliency = self.scores(seen, context.index).tolist()

    def scores(self, seen: ExpertSaliency, layer: int) -> Tensor:
        """How much each expert of a layer matters, by the recipe's criterion."""
        return score(seen, self.recipe.criterion, self.recipe.seed, layer)

    def keep(self, seen: ExpertSaliency, layer: int) -> Tensor:
        """The numbers of the experts that a layer keeps, rising."""
        return choose(self.scores(seen, layer), seen.super_experts, self.kept, self.groups)

    def merge(
        self,
        router: nn.Module,
        experts: Experts,
        kept: Tensor,
        seen: ExpertSaliency,
        inputs: Tensor,
        given: Tensor,
    ) -> tuple[dict[int, int], Iterator[tuple[int, dict[str, Tensor]]]]:
        """Who of the `kept` experts absorbs each of the others, and what parameters that gives them, by number.

        `inputs` (tokens, hidden) are a sample of what the router reads, `given` (tokens, width) what its block calls
        experts with then; nothing is changed.
        """
        nearness = NEARNESS[self.recipe.nearness](router, experts, inputs, given)
        absorbed_by = absorbers(nearness, kept, seen.super_experts, self.groups)
        aligned_on = given if self.recipe.consolidate == "permute" else None
        return absorbed_by, merge_experts(experts, absorbed_by, seen.gated_norms, aligned_on)

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        expert = re.search(rf"\.{re.escape(self.architecture.experts)}\.(\d+)\.", name)
        if expert:
            return shape if int(expert[1]) < self.kept else None
        block = name.rpartition(".")[0]
        routes = f".{self.architecture.router}." in name or block.endswith(f".{self.architecture.moe_block}")
        if routes and self.experts in shape:
            place = shape.index(self.experts)
            return (*shape[:place], self.kept, *shape[place + 1 :])
        return shape

    def configuration(self) -> Mapping[str, Any]:
        return dict.fromkeys(self.keys, self.kept)


class PruneExpertsKind:
    """What a recipe can say, and whether it fits a model."""

    name = NAME
    options = PruneExpertsOptions
    after = ()

    def make(
        self, options: PruneExpertsOptions, config: Any, architecture: Architecture, model: str
    ) -> PruneExperts:
        """Check the counts against a model's configuration; raises RecipeError or ModelError."""
        if not architecture.moe_block:
            raise RecipeError(f"{NAME}: {model} ({architecture.model_type}) has no experts")
        if not all(kind.routes_alone for kind in architecture.kinds):
            raise RecipeError(
                f"{NAME}: {model} ({architecture.model_type}) has layers that choose experts by more than what their "
                "router reads (a table of tokens, say), or call them with rows that a gate has multiplied: all must "
                "stay; leave the pass out"
            )
        (experts, keys), top_k = expert_count(config), experts_used(config)
        routing = routing_groups(config)
        groups = routing.groups
        if experts % groups:
            raise ModelError(f"{model}: its {groups} routing groups do not divide its {experts} experts")
        kept = options.keep_experts or round(experts * (1 - (options.prune_ratio or 0.0)))
        _check_count(options, kept, experts, top_k, routing)
        return PruneExperts(experts, kept, groups, keys, options, architecture)


def _check_count(
    options: PruneExpertsOptions, kept: int, experts: int, top_k: int, routing: RoutingGroups
) -> None:
    """Raise RecipeError where `kept` experts cannot stay, of which a token uses `top_k`."""
    groups, used = routing.groups, routing.used
    step = math.lcm(groups, options.expert_parallel)
    least = max(groups * max(routing.choosers, -(-top_k // used)), 1)
    allowed = ", ".join(str(n) for n in range(-(-least // step) * step, experts + 1, step)) or "none"
    given = f"keep_experts = {kept}" if options.keep_experts else f"prune_ratio = {options.prune_ratio}"
    asked = f"{NAME}.{given} keeps {kept} of {experts} experts"
    reason = ""
    if kept // groups * used < top_k:
        reason = f", and each token uses {top_k}"
    elif kept // groups < routing.choosers:
        reason = f", and its router chooses each of {groups} groups by {routing.choosers} experts"
    elif kept % groups:
        reason = f", which its {groups} routing groups do not divide"
    elif kept % options.expert_parallel:
        reason = f", which expert_parallel = {options.expert_parallel} does not divide"
    if reason or kept > experts:
        raise RecipeError(f"{asked}{reason}; allowed counts: {allowed}")
