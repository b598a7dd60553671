"""Groups of linears of a planned run, counted: inputs, outputs, and how many of them there are."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from lowbit_quantize.model.architecture import LayerKind, LinearGroup, linear_of
from lowbit_quantize.model.experts.routing import USED
from lowbit_quantize.plan import Plan
from lowbit_quantize.walk.module_plan import ModulePlan


@dataclass(frozen=True)
class Group:
    """Linears that share `inputs`; `outputs` are those of all of them.

    One of a `routed` expert stands for `count`, of which a token goes through `used`. `entry` is the table's, None
    where they stay as they are.
    """

    of: LinearGroup
    inputs: int
    outputs: int
    routed: bool
    count: int
    used: float
    entry: ModulePlan | None

    @property
    def drift_rows(self) -> int:
        """Rows of the sums that say how far its inputs are from the base's (error_compensation.py), 0 without them."""
        if self.of.other_readers or self.of.enters or self.routed:
            return 0
        return self.outputs if self.of.residual or 2 * self.outputs <= self.inputs else self.inputs


def kinds_of(plan: Plan) -> Iterator[tuple[int, LayerKind, int]]:
    """The first layer of each kind, the kind, and how many layers are of it."""
    kinds = plan.architecture.kinds
    for kind, count in Counter(kinds).items():
        yield kinds.index(kind), kind, count


def groups_of(plan: Plan, index: int, kind: LayerKind) -> Iterator[Group]:
    """Each group of a layer, the first expert's where experts have it."""
    layer: nn.Module = plan.skeleton.get_submodule(f"{plan.architecture.layers}.{index}")
    count = len(layer.get_submodule(kind.experts)) if kind.experts else 1  # type: ignore[arg-type]
    chosen = next((getattr(plan.config, name) for name in USED if hasattr(plan.config, name)), 1)
    for group in kind.groups:
        routed, first = "*" in group.linears[0], group.of_expert(0)
        linears = [linear_of(layer, name) for name in first.linears]
        entry = plan.modules.get(f"{plan.architecture.layers}.{index}.{first.linears[0]}")
        shape = linears[0].in_features, sum(one.out_features for one in linears)
        yield Group(first, *shape, routed, count if routed else 1, float(chosen) if routed else 1.0, entry)
