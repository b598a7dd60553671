"""What a run computes, and about how long that takes: products counted from shapes, over rates that are measured here.

Only matrix products are counted, which most of a run is; what is beside them (searches, attention, files, Python) is
taken as the share that it had of measured runs. For GPUs there is no measured run yet: their time is that of the
products at a share of the maker's figures, and is called so.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit_quantize.check.groups import Group, groups_of, kinds_of
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
    for index, kind, layers in kinds_of(plan):
        for group in groups_of(plan, index, kind):
            once = 2 * group.inputs * group.outputs * group.used
            forward += layers * once * (PASSES * streams * calibrated + judged)
            exact += layers * once * float32
            if group.entry is not None:
                tokens = calibrated * group.used / group.count
                exact += layers * group.count * _quantizing(group.entry, group, tokens)
    head = 2 * plan.config.hidden_size * plan.config.vocab_size
    return Effort(forward, exact + head * 2 * judged)


def _quantizing(entry: ModulePlan, group: Group, tokens: float) -> float:
    """Operations in float32 for one group: Hessian, factor, codes, refined scales, and what it aims at."""
    if not any("hessian" in method.needs for method in entry.methods):
        return 0.0
    inputs, outputs, square = group.inputs, group.outputs, group.inputs**2
    total = tokens * square * 7 / 6 + 3 * outputs * square  # the Hessian's blocks, and refining
    if entry.pruner is not None:
        total += 2 * entry.pruner.products * outputs * square
    if not entry.compensates:
        return total
    total += inputs * square / 3 + outputs * square
    if rows := group.drift_rows:
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
