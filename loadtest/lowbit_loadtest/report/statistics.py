"""Percentiles and their 95 % intervals: pure arithmetic on arrays.

Intervals are bootstrap percentile intervals (Efron 1979). What is resampled is not single values but units that vary
together: whole repetitions, and within each one blocks of consecutive requests (Künsch 1989), because requests that
queue behind one another are late together. scipy's bootstrap has neither, so these draws are ours. With one repetition
only blocks are drawn, and the interval says nothing of how repetitions differ. All values of a drawn request count as
often as it was drawn, so a percentile is that of a weighted sample, and equals numpy's of the sample written out.
scipy is imported when it is first used, because that takes a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

CONFIDENCE = 0.95
RESAMPLES = 400
MOST_WEIGHTED_VALUES = 40_000_000  # values times resamples; beyond it fewer resamples are drawn
FEWEST_RESAMPLES = 100
MEAN_RESAMPLES = 2000
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p999": 99.9}


@dataclass(frozen=True)
class Bounds:
    """A 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Distribution:
    """Percentiles interpolate linearly between neighbours (numpy's default); `interval` has each one's bounds."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    p999: float
    interval: dict[str, Bounds]


@dataclass(frozen=True)
class Sample:
    """Values with the number of the request that each belongs to, requests numbered in order of time."""

    values: Floats
    owners: Integers
    requests: int

    @staticmethod
    def of(values_of_requests: Sequence[Sequence[float]]) -> "Sample":
        """One sequence of values for each request, in order."""
        sizes = [len(values) for values in values_of_requests]
        flat = np.array([value for values in values_of_requests for value in values], dtype=np.float64)
        return Sample(flat, np.repeat(np.arange(len(sizes)), sizes), len(sizes))


def distribution(repetitions: Sequence[Sample], seed: int = 0, intervals: bool = True) -> Distribution | None:
    """Mean and percentiles of all repetitions together; None of nothing."""
    values = np.concatenate([sample.values for sample in repetitions]) if repetitions else np.empty(0)
    if values.size == 0:
        return None
    points = np.percentile(values, list(PERCENTILES.values()))
    named = {name: float(point) for name, point in zip(PERCENTILES, points, strict=True)}
    bounds = bootstrap(repetitions, seed) if intervals else {}
    return Distribution(count=int(values.size), mean=float(values.mean()), interval=bounds, **named)


def bootstrap(repetitions: Sequence[Sample], seed: int = 0) -> dict[str, Bounds]:
    """Bounds of the mean and of each percentile; empty when there is one request and nothing to draw."""
    if sum(sample.requests for sample in repetitions) < 2:
        return {}
    rng = np.random.default_rng(seed)
    values, owners = _joined(repetitions)
    order = np.argsort(values, kind="stable")
    values, owners = values[order], owners[order]
    draws = int(np.clip(MOST_WEIGHTED_VALUES // values.size, FEWEST_RESAMPLES, RESAMPLES))
    resampled = []
    for _ in range(draws):
        weights = request_weights(repetitions, rng)[owners]
        if weights.any():
            resampled.append(weighted_statistics(values, weights))
    return {name: bounds_of([one[name] for one in resampled]) for name in ("mean", *PERCENTILES)}


def weighted_statistics(values: Floats, weights: Integers) -> dict[str, float]:
    """Mean and percentiles of sorted `values`, each standing `weights` times."""
    upto = np.cumsum(weights)
    total = int(upto[-1])
    ranks = np.array(list(PERCENTILES.values())) / 100 * (total - 1)
    lower = np.floor(ranks).astype(np.int64)
    below = values[np.searchsorted(upto, lower, side="right")]
    above = values[np.searchsorted(upto, np.minimum(lower + 1, total - 1), side="right")]
    points = below + (ranks - lower) * (above - below)
    mean = float(values @ weights) / total
    return {"mean": mean, **dict(zip(PERCENTILES, map(float, points), strict=True))}


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> Bounds | None:
    """Bounds of the mean of one number a repetition; None for fewer than two repetitions."""
    if len(values) < 2:
        return None
    from scipy.stats import bootstrap as scipy_bootstrap

    drawn = scipy_bootstrap((values,), np.mean, n_resamples=MEAN_RESAMPLES, method="percentile", rng=seed)
    return Bounds(float(drawn.confidence_interval.low), float(drawn.confidence_interval.high))


def student_mean(values: Sequence[float] | Floats) -> Bounds | None:
    """Bounds of the mean of a few numbers by Student's t; None for fewer than two."""
    if len(values) < 2:
        return None
    array = np.asarray(values, dtype=np.float64)
    half = _student(array.size - 1) * float(array.std(ddof=1)) / array.size**0.5
    return Bounds(float(array.mean()) - half, float(array.mean()) + half)


def student_difference(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> Bounds | None:
    """Bounds of mean(b) - mean(a), drawn apart: Welch's standard error, the smaller sample's degrees of freedom."""
    smaller = min(len(a), len(b))
    if smaller < 2:
        return None
    squares = sum(float(np.var(one, ddof=1)) / len(one) for one in (a, b))
    middle, half = float(np.mean(b)) - float(np.mean(a)), _student(smaller - 1) * squares**0.5
    return Bounds(middle - half, middle + half)


def _student(freedom: int) -> float:
    """How many standard errors the interval reaches to either side."""
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))


def _joined(repetitions: Sequence[Sample]) -> tuple[Floats, Integers]:
    starts = np.cumsum([0, *(sample.requests for sample in repetitions)])
    owners = [sample.owners + start for sample, start in zip(repetitions, starts[:-1], strict=True)]
    return np.concatenate([sample.values for sample in repetitions]), np.concatenate(owners)


def request_weights(repetitions: Sequence[Sample], rng: np.random.Generator) -> Integers:
    """How often each request is drawn in one resample."""
    drawn = rng.integers(0, len(repetitions), len(repetitions)) if len(repetitions) > 1 else np.zeros(1, int)
    times_drawn = np.bincount(drawn, minlength=len(repetitions))
    return np.concatenate(
        [
            sum((block_weights(sample.requests, rng) for _ in range(times)), np.zeros(sample.requests, int))
            for sample, times in zip(repetitions, times_drawn, strict=True)
        ]
    )


def block_weights(requests: int, rng: np.random.Generator) -> Integers:
    """Draws for `requests` requests in blocks of about their cube root, wrapping around at the end."""
    if requests == 0:
        return np.zeros(0, int)
    block = max(1, round(requests ** (1 / 3)))
    starts = rng.integers(0, requests, -(-requests // block))
    chosen = (starts[:, None] + np.arange(block)).ravel()[:requests] % requests
    return np.bincount(chosen, minlength=requests)


def bounds_of(values: Sequence[float] | Floats) -> Bounds:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(np.asarray(values, dtype=np.float64), [tail, 100 - tail])
    return Bounds(float(low), float(high))
