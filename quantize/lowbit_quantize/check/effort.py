"""What a run computes, and about how long that takes: products counted from shapes, over rates that are measured here.

Only matrix products are counted, which most of a run is; what is beside them (searches, attention, files, Python) is
taken as the share that it had of measured runs. For GPUs there is no measured run yet: their time is that of the
products at a share of the maker's figures, and is called so.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit_quantize.model.architecture import LayerKind, LinearGroup, linear_of
from lowbit_quantize.model.experts.routing import USED
from lowbit_quantize.plan import Plan
from lowbit_quantize.quality.dataset import TokenText, judging_ids
from lowbit_quantize.statistics.error_compensation import COMPONENT_BLOCK
from lowbit_quantize.walk.baselines import FLOAT32
from lowbit_quantize.walk.module_plan import ModulePlan

PASSES = 2  # of each calibration stream through a layer: to be observed, and on to the next
OTHERS = 1.8  # a run's time over its products': one quiet run, demo by awq-g64 (benchmarks/scale/effort.py)
RATE_TOKENS, RATE_SIZE, RATE_TIMES = 1024, 2048, 3
GPU_SHARE = 0.3  # of the maker's figures, an assumption
GPUS = {"H100": (989e12, 67e12), "A100": (312e12, 19.5e12)}  # bfloat16 and float32, dense, a second (SXM)


@dataclass(frozen=True)
class Effort:
    """Floating-point operations of products: of forward passes, in the base's type, and of the rest, in float32."""

    forward: float
    exact: float

    def seconds(self, forward_rate: float, exact_rate: float) -> float:
        """At these operations a second."""
        return self.forward / forward_rate + self.exact / exact_rate

    def seconds_here(self) -> float:
        """About how long a run takes with this process's threads; measures for a moment."""
        return OTHERS * self.seconds(rate(torch.bfloat16), rate(torch.float32))

    def seconds_on(self, gpu: str) -> float:
        """What products take on one of `GPUS` at a share of its maker's figures."""
        forward, exact = GPUS[gpu]
        return self.seconds(GPU_SHARE * forward, GPU_SHARE * exact)


def effort(plan: Plan, calibration: TokenText, heldout: TokenText) -> Effort:
    """That of a run of a plan on these texts."""
    rows = plan.baselines(heldout.domains)
    float32 = len(rows.get(FLOAT32, ())) * heldout.ids.shape[1]
    judged = (
        2 * judging_ids(calibration, heldout).numel()
        + sum(map(len, rows.values())) * heldout.ids.shape[1]
        - float32
    )
    calibrated, streams = calibration.ids.numel(), 2 if plan.paired else 1
    forward = exact = 0.0
    for index, kind, layers in _kinds(plan):
        layer: nn.Module = plan.skeleton.get_submodule(f"{plan.architecture.layers}.{index}")
        for group, experts, used in _groups(plan, layer, kind):
            inputs, outputs = _shape(layer, group)
            once = 2 * inputs * outputs * used
            forward += layers * once * (PASSES * streams * calibrated + judged)
            exact += layers * once * float32
            entry = plan.modules.get(f"{plan.architecture.layers}.{index}.{group.linears[0]}")
            if entry is not None:
                tokens = calibrated * used / experts
                exact += layers * experts * _quantizing(entry, group, inputs, outputs, tokens)
    head = 2 * plan.config.hidden_size * plan.config.vocab_size
    return Effort(forward, exact + head * 2 * judged)


def _kinds(plan: Plan) -> Iterator[tuple[int, LayerKind, int]]:
    """The first layer of each kind, the kind, and how many layers are of it."""
    kinds = plan.architecture.kinds
    for kind, count in Counter(kinds).items():
        yield kinds.index(kind), kind, count


def _groups(plan: Plan, layer: nn.Module, kind: LayerKind) -> Iterator[tuple[LinearGroup, int, float]]:
    """Each group, the first expert's where experts have it; how many there are, and how many a token goes through."""
    count = len(layer.get_submodule(kind.experts)) if kind.experts else 1  # type: ignore[arg-type]
    chosen = next((getattr(plan.config, name) for name in USED if hasattr(plan.config, name)), 1)
    for group in kind.groups:
        routed = "*" in group.linears[0]
        yield group.of_expert(0), count if routed else 1, float(chosen) if routed else 1.0


def _shape(layer: nn.Module, group: LinearGroup) -> tuple[int, int]:
    """Inputs, and outputs of all its linears."""
    linears = [linear_of(layer, name) for name in group.linears]
    return linears[0].in_features, sum(one.out_features for one in linears)


def _quantizing(entry: ModulePlan, group: LinearGroup, inputs: int, outputs: int, tokens: float) -> float:
    """Operations in float32 for one group: Hessian, factor, codes, refined scales, and what it aims at."""
    if not any("hessian" in method.needs for method in entry.methods):
        return 0.0
    square = inputs * inputs
    total = tokens * square * 7 / 6 + 3 * outputs * square  # the Hessian's blocks, and refining
    if entry.pruner is not None:
        total += 2 * entry.pruner.products * outputs * square
    if not entry.compensates:
        return total
    total += inputs * square / 3 + outputs * square
    if not (group.other_readers or group.enters):
        rows = outputs if group.residual or 2 * outputs <= inputs else inputs
        together = min(inputs, COMPONENT_BLOCK)
        total += 2 * tokens * inputs * rows + inputs * square / 3 + 3 * outputs * square
        total += inputs * together * (9 * together + 6 * outputs)  # principal components, and turning to them
    return total


def rate(dtype: torch.dtype) -> float:
    """Operations a second of a product in this type, by this process's threads: the best of a few."""
    rows, weight = (
        torch.ones(RATE_TOKENS, RATE_SIZE, dtype=dtype),
        torch.ones(RATE_SIZE, RATE_SIZE, dtype=dtype),
    )
    best = float("inf")
    for _ in range(RATE_TIMES + 1):  # the first is slower
        began = time.perf_counter()
        nn.functional.linear(rows, weight)
        best = min(best, time.perf_counter() - began)
    return 2.0 * RATE_TOKENS * RATE_SIZE * RATE_SIZE / best


def report(plan: Plan, calibration: TokenText, heldout: TokenText) -> dict[str, Any]:
    """For `--dry-run`."""
    found = effort(plan, calibration, heldout)
    return {
        "operations": {"forward": found.forward, "float32": found.exact},
        "seconds_here": round(found.seconds_here(), 1),
        "seconds_of_products_on": {gpu: round(found.seconds_on(gpu), 1) for gpu in GPUS},
    }
