"""What a load test gives: a point for each rate, and between which rates the SLOs begin to be missed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowbit_loadtest.generate.http.target import Target
from lowbit_loadtest.quality.verdict import QualityResult
from lowbit_loadtest.report.server_metrics import UsageCheck
from lowbit_loadtest.report.summary import Run, Summary
from lowbit_loadtest.scenario import Scenario

Seen = Sequence[tuple[float, bool]]  # each rate that was measured, and whether it met the SLOs


@dataclass(frozen=True)
class Point:
    """One rate, all its repetitions. `valid` is False when the generator was too late to be believed."""

    offered_rps: float | None
    runs: tuple[Run, ...]
    summary: Summary
    valid: bool
    invalid_because: tuple[str, ...]
    server: tuple[dict[str, Any], ...]  # the server's own metrics, one a repetition
    usage: tuple[UsageCheck, ...]

    def meets(self, scenario: Scenario) -> bool:
        """Whether enough requests met the SLOs."""
        attained = self.summary.slo_attainment
        return attained is not None and attained >= scenario.slo.attainment


@dataclass(frozen=True)
class Result:
    """A whole load test."""

    target: Target
    points: tuple[Point, ...]
    workers: int
    counted_by: str  # who counted prompt tokens: server or words
    interrupted: bool
    quality: QualityResult | None = None


def highest_rate(scenario: Scenario, points: Sequence[Point]) -> dict[str, float | None] | None:
    """Between which rates the SLOs begin to be missed; None for a run that does not vary its rate."""
    if len(points) < 2 or not scenario.slo.limits_s:
        return None
    meets, misses = bracket(seen_rates(scenario, points))
    return {"meets_slo_rps": meets, "misses_slo_rps": misses}


def seen_rates(scenario: Scenario, points: Sequence[Point]) -> Seen:
    """Each measured rate, and whether it met the SLOs in a run that can be believed."""
    return [(point.offered_rps or 0.0, point.meets(scenario) and point.valid) for point in points]


def bracket(seen: Seen) -> tuple[float | None, float | None]:
    """The highest rate that met them below every one that did not, and the lowest that did not."""
    fails = min((rate for rate, met in seen if not met), default=None)
    meets = max((rate for rate, met in seen if met and (fails is None or rate < fails)), default=None)
    return meets, fails
