"""A pass of the benchmark alone: the router's rows of merged experts are averaged too, as their weights were.

The log-sum-exp of a group's logits, which would keep its routing mass, is not linear in what the router reads; the
average of its rows is the nearest to it that a router can hold. run.py measures it beside the dominant experts' rows.
"""

from typing import Any

from torch import nn

from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.passes.kind import NoOptions, PlainPass
from lowbit_quantize.statistics.expert_saliency import ExpertSaliency, see_routing
from lowbit_quantize.walk.layer import LayerContext


class MergeRouterRows(PlainPass):
    """Each row becomes the average over its group of the base's rows, weighed by the tokens routed to each."""

    name = "merge_router_rows"

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture

    def run(self, layer: nn.Module, context: LayerContext) -> None:
        absorbed_by, kept = context.result.absorbed_by, context.result.kept_experts
        if absorbed_by is None or kept is None:
            return
        base = context.base_layer()
        rows: Any = base.get_submodule(self._architecture.router)
        seen = ExpertSaliency(len(rows.weight))
        see_routing(context.decoder, base, context.index, context.calibration, seen)
        router: Any = layer.get_submodule(self._architecture.router)
        for place, number in enumerate(kept):
            group = [number, *(gone for gone, by in absorbed_by.items() if by == number)]
            weights = (seen.tokens[group] / seen.tokens[group].sum().clamp(min=1)).float()
            if len(group) > 1:
                router.weight[place] = weights @ rows.weight[group].float()


class MergeRouterRowsKind:
    """It has no options and stands after what merges."""

    name = MergeRouterRows.name
    options = NoOptions
    after = ("prune_experts",)

    def make(
        self, options: NoOptions, config: Any, architecture: Architecture, model: str
    ) -> MergeRouterRows:
        return MergeRouterRows(architecture)
