"""Latencies of two loads: how much later B's completed requests are than A's, and what their failures make of that.

Numbers are of completed requests. The verdict counts a failed request as one that was never answered, later than every
answer (worst-rank analysis: Lachin, Worst-rank score analysis with informatively missing observations, 1999). So no
server looks faster for having dropped its slow requests, and turning an answer into a failure never mends a verdict.

Runs of one scenario and seed are paired: request i of repetition r was due at the same time and asked the same of both,
so both are drawn together in the bootstrap, and what made request i slow in both cancels. Others are drawn apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit_loadtest.compare.outcomes import DRAWS, Verdict, judge
from lowbit_loadtest.compare.side import COMPLETED, LATENCIES, At, Key, Load, Request
from lowbit_loadtest.report.statistics import Bounds, Sample, bounds_of, request_weights, weighted_statistics

STATISTICS = ("p50", "p95")
FEWEST = 20  # requests on each side, below which no latency is judged
NEVER_S = 1e6  # what a percentile is taken for that lies among the failed requests
_FAILED_S = (
    1e12  # a failed request's place in the order: interpolated with an answer, it is still above NEVER_S
)

Values = dict[Key, float]


@dataclass(frozen=True)
class Draws:
    """Of a bootstrap."""

    seed: int
    count: int


@dataclass(frozen=True)
class Difference:
    """One metric at one load. `change` is B/A − 1 and `interval` its 95 % interval; None where nothing says it.

    `completed_alone` is what the completed requests alone would have said, where failures changed the verdict.
    """

    metric: str
    at: At
    a: float
    b: float
    change: float
    interval: Bounds | None
    verdict: Verdict
    lower_is_better: bool = True
    completed_alone: Verdict | None = None


def latency_differences(
    a: Load, b: Load, paired: bool, tolerance: float, seed: int = 0, draws: int = DRAWS
) -> list[Difference]:
    """Each latency that both sides have, by percentile; of files without requests without an interval."""
    if a.requests is None or b.requests is None:
        return _of_statistics(a, b)
    found = []
    for metric, name in LATENCIES.items():
        sides = _Sides.of(a.requests, b.requests, metric, paired)
        if sides.completed:
            found += _judged(sides, name, a.at or b.at, tolerance, Draws(seed, draws))
    return found


@dataclass(frozen=True)
class _Sides:
    """Values of completed requests, and of all with the failed ones last; one pair each of A and B."""

    completed: tuple[Values, Values] | None
    ranked: tuple[Values, Values]
    paired: bool
    completed_paired: bool  # not where no request completed on both sides

    @staticmethod
    def of(a: Mapping[Key, Request], b: Mapping[Key, Request], metric: str, paired: bool) -> "_Sides":
        ranked = _ranked(a, metric), _ranked(b, metric)
        if paired:
            both = ranked[0].keys() & ranked[1].keys()
            ranked = tuple({key: one[key] for key in both} for one in ranked)  # type: ignore[assignment]
        completed = tuple({key: one[key] for key in one if one[key] < NEVER_S} for one in ranked)
        common = completed[0].keys() & completed[1].keys()
        together = paired and bool(common)
        if together:
            completed = tuple({key: one[key] for key in common} for one in completed)
        return _Sides(completed if all(completed) else None, ranked, paired, together)  # type: ignore[arg-type]


def _ranked(requests: Mapping[Key, Request], metric: str) -> Values:
    """Each request's latency, failed ones last; a completed one without this latency is left out."""
    return {
        key: request.latencies_s.get(metric, 0.0) if request.outcome == COMPLETED else _FAILED_S
        for key, request in requests.items()
        if request.outcome != COMPLETED or metric in request.latencies_s
    }


def _judged(sides: _Sides, name: str, at: At, tolerance: float, draws: Draws) -> list[Difference]:
    assert sides.completed is not None
    alone = _changes(sides.completed, sides.completed_paired, draws)
    failed = any(value >= NEVER_S for one in sides.ranked for value in one.values())
    ranked = _changes(sides.ranked, sides.paired, draws) if failed else alone
    enough = all(len(one) >= FEWEST for one in sides.ranked)
    found = []
    for statistic in STATISTICS:
        a, b, interval = alone[statistic]
        change = b / a - 1 if a > 0 else 0.0
        by_itself = judge(change, interval, tolerance, lower_is_better=True)
        ranked_a, ranked_b, bounds = ranked[statistic]
        verdict = judge(_relative(ranked_a, ranked_b), bounds, tolerance, True) if enough else "undecided"
        other = by_itself if enough and by_itself != verdict else None
        found.append(
            Difference(f"{name} {statistic}", at, a, b, change, interval, verdict, completed_alone=other)
        )
    return found


def _of_statistics(a: Load, b: Load) -> list[Difference]:
    known_a, known_b = (load.statistics or _percentiles(load) for load in (a, b))
    return [
        Difference(
            f"{LATENCIES[metric]} {statistic}",
            a.at or b.at,
            value,
            other,
            other / value - 1,
            None,
            "undecided",
        )
        for (metric, statistic), value in known_a.items()
        if (other := known_b.get((metric, statistic))) is not None and value > 0
    ]


def _percentiles(load: Load) -> dict[tuple[str, str], float]:
    """Of completed requests, to stand beside those of a file without requests."""
    found: dict[tuple[str, str], float] = {}
    for metric in LATENCIES:
        values = [
            request.latencies_s[metric]
            for request in (load.requests or {}).values()
            if metric in request.latencies_s
        ]
        if values:
            p50, p95 = np.percentile(values, [50, 95])
            found |= {(metric, "p50"): float(p50), (metric, "p95"): float(p95)}
    return found


def _changes(
    values: tuple[Values, Values], paired: bool, draws: Draws
) -> dict[str, tuple[float, float, Bounds | None]]:
    """Each statistic of A, of B, and the interval of B/A − 1."""
    samples = [_by_repetition(one) for one in values]
    (values_a, order_a), (values_b, order_b) = (_sorted(one) for one in samples)
    whole = [weighted_statistics(one, np.ones(one.size, int)) for one in (values_a, values_b)]
    rng = np.random.default_rng(draws.seed)
    changes: dict[str, list[float]] = {name: [] for name in STATISTICS}
    for _ in range(draws.count):
        weights_a = request_weights(samples[0], rng)
        weights_b = weights_a if paired else request_weights(samples[1], rng)
        if weights_a.any() and weights_b.any():
            drawn_a = weighted_statistics(values_a, weights_a[order_a])
            drawn_b = weighted_statistics(values_b, weights_b[order_b])
            for name in STATISTICS:
                changes[name].append(_relative(drawn_a[name], drawn_b[name]))
    known = values_a.size > 1 and values_b.size > 1
    return {
        name: (whole[0][name], whole[1][name], bounds_of(changes[name]) if known else None)
        for name in STATISTICS
    }


def _relative(a: float, b: float) -> float:
    """B/A − 1; 0 where neither was answered."""
    a, b = min(a, NEVER_S), min(b, NEVER_S)
    return b / a - 1 if a > 0 else 0.0


def _by_repetition(values: Values) -> list[Sample]:
    ordered = sorted(values)
    return [
        Sample.of([[values[key]] for key in ordered if key[0] == one])
        for one in sorted({key[0] for key in ordered})
    ]


def _sorted(samples: Sequence[Sample]) -> tuple[Any, Any]:
    values = np.concatenate([sample.values for sample in samples])
    order = np.argsort(values, kind="stable")
    return values[order], order
