"""The knee of a curve: where more load stops to buy throughput. Pure arithmetic.

Kneedle (Satopää, Albrecht, Irwin and Raghavan, Finding a "Kneedle" in a Haystack, ICDCS workshops 2011): both axes are
scaled to 0..1, and the knee is where the curve is highest above the diagonal. It counts when the curve falls more than
`SENSITIVITY` mean steps of x towards the diagonal after it; else throughput still grows. A sweep has few points: none
are smoothed, and a knee is one of them.

How sure it is comes from the bootstrap: each point's throughput is drawn again from slices of its windows, the knee is
found again, and the values named in 95 % of the draws are its interval. Slices of one window follow one another: with
one repetition the interval does not contain how repetitions differ.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowbit_loadtest.report.statistics import CONFIDENCE, Floats

SENSITIVITY = 1.0  # Kneedle's S; 1 is the authors' choice for data that is at hand as a whole
LEAST_GROWTH = 0.05  # below it the curve is flat, and its shape is noise
FEWEST = 3  # values
RESAMPLES = 1000
RULE = (
    "Kneedle (Satopää et al. 2011), S = 1: the point highest above the line from the first to the last, both axes "
    "scaled to 0..1"
)
NO_KNEE, FLAT, FEW = (
    "throughput still grows at the highest value; sweep further",
    "throughput does not grow; sweep from lower values",
    "a knee needs three values or more",
)


@dataclass(frozen=True)
class Knee:
    """The knee along one key of a sweep, the others fixed `at` their values. `value` is None where there is none.

    `low`..`high` holds the values that at least 95 % of the draws name; `shares` has all of them, `none` too.
    """

    along: str
    at: dict[str, float]
    measure: str
    value: float | None
    low: float | None
    high: float | None
    shares: dict[str, float]
    because: str | None  # why there is none
    rule: str = RULE


def find_knee(
    along: str, at: dict[str, float], measure: str, xs: Sequence[float], slices: Sequence[Floats]
) -> Knee:
    """`slices` has for each value of `xs` the throughputs of slices of its windows: (repetitions, slices)."""
    throughput = [float(one.mean()) for one in slices]
    value, because = kneedle(xs, throughput)
    rng = np.random.default_rng(0)
    draws = np.stack([_draws(one, rng) for one in slices])  # (values, draws)
    counts = Counter(kneedle(xs, ys)[0] for ys in draws.T)
    shares = {_name(one): counts[one] / RESAMPLES for one in sorted(counts, key=_order)}
    low, high = (None, None) if value is None else _interval(counts, value)
    return Knee(along, at, measure, value, low, high, shares, because)


def kneedle(xs: Sequence[float], ys: Sequence[float] | Floats) -> tuple[float | None, str | None]:
    """The knee of an increasing, bending curve; or None and the reason."""
    if len(xs) < FEWEST:
        return None, FEW
    x, y = np.asarray(xs, dtype=np.float64), np.asarray(ys, dtype=np.float64)
    if float(np.ptp(y)) < LEAST_GROWTH * float(np.max(y)) or int(np.argmax(y)) == 0:
        return None, FLAT
    x, y = (x - x.min()) / np.ptp(x), (y - y.min()) / np.ptp(y)
    above = y - x
    best = int(np.argmax(above))
    threshold = above[best] - SENSITIVITY * float(np.mean(np.diff(x)))
    if best == 0 or not bool((above[best + 1 :] < threshold).any()):
        return None, NO_KNEE
    return float(xs[best]), None


def _draws(slices: Floats, rng: np.random.Generator) -> Floats:
    """Means of repetitions drawn again, and within each of them slices drawn again."""
    repetitions, count = slices.shape
    chosen = rng.integers(0, repetitions, (RESAMPLES, repetitions, 1))
    means: Floats = slices[chosen, rng.integers(0, count, (RESAMPLES, repetitions, count))].mean(axis=(1, 2))
    return means


def _interval(counts: Counter[float | None], value: float) -> tuple[float, float]:
    """The most frequent values that have 95 % of the draws with a knee, and the value itself."""
    named = [(one, count) for one, count in counts.most_common() if one is not None]
    kept, wanted = [value], CONFIDENCE * sum(count for _, count in named)
    for one, _ in named:
        if sum(counts[one] for one in set(kept)) >= wanted:
            break
        kept.append(one)
    return min(kept), max(kept)


def _name(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


def _order(value: float | None) -> float:
    return float("inf") if value is None else value
