"""Two results side by side: by how much B differs from A, how sure that is, and a verdict. Pure arithmetic.

Runs of one scenario and seed are paired: request i of repetition r was due at the same time and asked the same of both,
so both are drawn together in the bootstrap, and what made request i slow in both cancels. Runs of different scenarios
are drawn apart. Throughput, which a closed loop measures, is one number a repetition: the mean ratio of these is judged
by Student's t. Quality under load is compared item by item (core's `evals`).

A difference is a verdict only when its interval excludes zero *and* it is larger than the tolerance; "same" needs the
whole interval inside the tolerance; everything else is undecided, and more repetitions would help.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lowbit_core.errors import ConfigError
from lowbit_core.evals.arithmetic import Estimate
from lowbit_core.evals.items import Key as ItemKey
from lowbit_core.evals.results import changes, from_rows, perplexity
from lowbit_core.evals.scoring import Answer
from lowbit_loadtest.report.statistics import (
    Bounds,
    Sample,
    bounds_of,
    request_weights,
    student_difference,
    student_mean,
    weighted_statistics,
)

Verdict = Literal["better", "worse", "same", "undecided"]
DRAWS = 500
LATENCIES = {"ttft_s": "time to first token", "tpot_s": "time per output token", "e2e_s": "end to end"}
STATISTICS = ("p50", "p95")
UNCOMPARED = (
    "description",
    "model",
    "api_key_env",
    "generator",
    "timeout_s",
    "quality",
)  # keys that leave the load the same

Row = dict[str, Any]
Key = tuple[int, int, int]


@dataclass(frozen=True)
class Difference:
    """One metric. `change` is B/A − 1; `interval` is its 95 % interval."""

    metric: str
    offered_rps: float | None
    a: float
    b: float
    change: float
    interval: Bounds | None
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    paired: bool
    differences: tuple[Difference, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst that is certain; "undecided" unless something is."""
        found = {one.verdict for one in self.differences}
        order: tuple[Verdict, ...] = ("worse", "undecided", "better", "same")
        return next((verdict for verdict in order if verdict in found), "undecided")


def compare(a: dict[str, Any], b: dict[str, Any], tolerance: float, seed: int = 0) -> Comparison:
    """Compare two documents of `lowbit loadtest --json`, rate by rate; ConfigError without a rate in common."""
    paired = load_of(a) == load_of(b)
    differences: list[Difference] = []
    for point_a, point_b in _common_points(a, b):
        differences += _latencies(point_a, point_b, paired, tolerance, seed)
        differences += _completed(point_a, point_b, paired, tolerance, seed)
        differences += _throughput(point_a, point_b, paired, tolerance)
    differences += _quality(a, b, tolerance)
    if not differences:
        raise ConfigError("the two results have no rate and no completed request in common")
    return Comparison(paired, tuple(differences))


def load_of(document: dict[str, Any]) -> dict[str, Any]:
    """What a scenario asks of a server: two results with the same can be paired."""
    return {key: value for key, value in document["scenario"].items() if key not in UNCOMPARED}


def _common_points(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[Row, Row]]:
    if len(a["points"]) == len(b["points"]) == 1:
        return [(a["points"][0], b["points"][0])]
    of_b = {point["offered_rps"]: point for point in b["points"]}
    return [(one, of_b[one["offered_rps"]]) for one in a["points"] if one["offered_rps"] in of_b]


def _rows(point: Row) -> dict[Key, Row]:
    table = point["request_table"]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    return {(row["repetition"], row["index"], row["turn"]): row for row in rows if not row["warm_up"]}


def _latencies(a: Row, b: Row, paired: bool, tolerance: float, seed: int) -> list[Difference]:
    found = []
    for column, name in LATENCIES.items():
        samples = _samples(_rows(a), _rows(b), column, paired)
        if all(sum(sample.values.size for sample in one) for one in samples):
            found += [
                _judged(f"{name} {statistic}", a["offered_rps"], *change, tolerance, lower_is_better=True)
                for statistic, change in _changes(samples, STATISTICS, paired, seed).items()
            ]
    return found


def _completed(a: Row, b: Row, paired: bool, tolerance: float, seed: int) -> list[Difference]:
    """The share of requests that completed: a server that drops the slow ones must not look fast."""
    shares = [
        {key: row | {"done": float(row["outcome"] == "completed")} for key, row in _rows(point).items()}
        for point in (a, b)
    ]
    samples = _samples(shares[0], shares[1], "done", paired)
    if not all(sum(sample.values.sum() for sample in one) for one in samples):
        return []
    change = _changes(samples, ("mean",), paired, seed)["mean"]
    return [_judged("share completed", a["offered_rps"], *change, tolerance, lower_is_better=False)]


def _throughput(a: Row, b: Row, paired: bool, tolerance: float) -> list[Difference]:
    """Output tokens/s of a closed loop; at a given rate of arrivals it is the rate's."""
    if a["offered_rps"] is not None:
        return []
    of_a, of_b = (
        [rates["output_tokens_per_s"] for rates in one.get("repetition_rates", [])] for one in (a, b)
    )
    if not of_a or not of_b or not all([*of_a, *of_b]):
        return []
    logs_a, logs_b = np.log(of_a), np.log(of_b)
    together = paired and len(of_a) == len(of_b)
    bounds = student_mean(logs_b - logs_a) if together else student_difference(logs_a, logs_b)
    interval = Bounds(float(np.expm1(bounds.low)), float(np.expm1(bounds.high))) if bounds else None
    means = float(np.exp(logs_a.mean())), float(np.exp(logs_b.mean()))
    return [_judged("output tokens/s", None, *means, interval, tolerance, lower_is_better=False)]


def _quality(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> list[Difference]:
    """Right answers, and perplexity of the texts, under load; only items that both answered."""
    of_a, of_b = map(_answers, (a, b))
    found, differences = changes(of_a, of_b), []
    pairs = [(of_a[key].acc_norm, of_b[key].acc_norm) for key in of_a if key in of_b]
    before = sum(bool(one) for one, other in pairs if one is not None and other is not None)
    if found.acc_norm_change and before:
        share, after = before / found.items, (before + found.gained - found.lost) / found.items
        bounds = _bounds(found.acc_norm_change, 0.0, share)
        differences.append(_judged("acc_norm", None, share, after, bounds, tolerance, False))
    if found.perplexity_ratio:
        value = perplexity(one for key, one in of_a.items() if key in of_b and one.kind == "text").value
        bounds = _bounds(found.perplexity_ratio, 1.0, 1.0)
        ratio = found.perplexity_ratio.value
        differences.append(_judged("perplexity", None, value, value * ratio, bounds, tolerance, True))
    return differences


def _answers(document: dict[str, Any]) -> dict[ItemKey, Answer]:
    try:
        return from_rows(((document.get("quality") or {}).get("answers") or {}).get("loaded", []))
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the answers in a result's quality section cannot be read: {error!r}") from error


def _bounds(one: Estimate, nothing: float, unit: float) -> Bounds | None:
    """The interval relative to what no change is; None where nothing is known of the spread."""
    if one.low is None or one.high is None:
        return None
    return Bounds((one.low - nothing) / unit, (one.high - nothing) / unit)


def _samples(
    a: dict[Key, Row], b: dict[Key, Row], column: str, paired: bool
) -> tuple[list[Sample], list[Sample]]:
    """One sample a repetition; paired: the requests that have the value in both, in the same order."""
    if paired:
        both = {
            key for key in a.keys() & b.keys() if a[key][column] is not None and b[key][column] is not None
        }
        a, b = ({key: one[key] for key in both} for one in (a, b))
    return _by_repetition(a, column), _by_repetition(b, column)


def _by_repetition(rows: dict[Key, Row], column: str) -> list[Sample]:
    repetitions = sorted({key[0] for key in rows})
    return [
        Sample.of(
            [[rows[key][column]] for key in sorted(rows) if key[0] == one and rows[key][column] is not None]
        )
        for one in repetitions
    ]


def _changes(
    samples: tuple[Sequence[Sample], Sequence[Sample]], statistics: Sequence[str], paired: bool, seed: int
) -> dict[str, tuple[float, float, Bounds | None]]:
    """Each statistic of A, of B, and the interval of B/A − 1."""
    (values_a, order_a), (values_b, order_b) = (_sorted(one) for one in samples)
    whole_a = weighted_statistics(values_a, np.ones(values_a.size, int))
    whole_b = weighted_statistics(values_b, np.ones(values_b.size, int))
    rng = np.random.default_rng(seed)
    ratios: dict[str, list[float]] = {name: [] for name in statistics}
    for _ in range(DRAWS):
        weights_a = request_weights(samples[0], rng)
        weights_b = weights_a if paired else request_weights(samples[1], rng)
        if weights_a.any() and weights_b.any():
            drawn_a = weighted_statistics(values_a, weights_a[order_a])
            drawn_b = weighted_statistics(values_b, weights_b[order_b])
            for name in statistics:
                ratios[name].append(drawn_b[name] / drawn_a[name] - 1 if drawn_a[name] > 0 else 0.0)
    known = values_a.size > 1 and values_b.size > 1
    return {
        name: (whole_a[name], whole_b[name], bounds_of(ratios[name]) if known else None)
        for name in statistics
    }


def _sorted(samples: Sequence[Sample]) -> tuple[Any, Any]:
    values = np.concatenate([sample.values for sample in samples])
    order = np.argsort(values, kind="stable")
    return values[order], order


def _judged(
    metric: str,
    offered_rps: float | None,
    a: float,
    b: float,
    interval: Bounds | None,
    tolerance: float,
    lower_is_better: bool,
) -> Difference:
    change = b / a - 1 if a > 0 else 0.0
    return Difference(
        metric, offered_rps, a, b, change, interval, judge(change, interval, tolerance, lower_is_better)
    )


def judge(change: float, interval: Bounds | None, tolerance: float, lower_is_better: bool) -> Verdict:
    """The verdict on one relative change."""
    if interval is None:
        return "undecided"
    if -tolerance <= interval.low and interval.high <= tolerance:
        return "same"
    higher = interval.low > 0 and change > tolerance
    lower = interval.high < 0 and change < -tolerance
    if not higher and not lower:
        return "undecided"
    return "better" if lower == lower_is_better else "worse"
