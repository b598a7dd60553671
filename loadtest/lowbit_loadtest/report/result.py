"""What a load test gives: a point for each rate, and between which rates the SLOs begin to be missed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowbit_loadtest.generate.http.target import Target
from lowbit_loadtest.generate.schedule import Recording
from lowbit_loadtest.quality.verdict import QualityResult
from lowbit_loadtest.report.knee import Knee
from lowbit_loadtest.report.server_metrics import UsageCheck
from lowbit_loadtest.report.sessions import Sessions
from lowbit_loadtest.report.summary import Run, Summary
from lowbit_loadtest.scenario import Scenario

Setting = Mapping[str, float]  # what a sweep, a search or a ramp set: concurrency, rate_rps, prompt_tokens, …
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
    setting: Setting = field(default_factory=dict)
    sessions: Sessions | None = None

    def meets(self, scenario: Scenario) -> bool:
        """Whether enough requests met the SLOs, and enough sessions their deadline."""
        attained = [self.summary.slo_attainment] if scenario.slo.limits_s else []
        if scenario.slo.session_s is not None:
            attained.append(self.sessions.attainment if self.sessions else None)
        return bool(attained) and all(
            share is not None and share >= scenario.slo.attainment for share in attained
        )


@dataclass(frozen=True)
class Joined:
    """A result that several machines sent: how many, how far apart they started, and how they asked."""

    parts: int
    starts_apart_s: float
    request: Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """A whole load test."""

    target: Target
    points: tuple[Point, ...]
    workers: int
    counted_by: str  # who counted prompt tokens: server or words
    interrupted: bool
    quality: QualityResult | None = None
    recording: Recording | None = None
    joined: Joined | None = None
    knees: tuple[Knee, ...] = ()


def highest_rate(scenario: Scenario, points: Sequence[Point]) -> dict[str, float | None] | None:
    """Between which rates the SLOs begin to be missed; None for a run that does not vary its rate alone."""
    only_rate = all(set(point.setting) == {"rate_rps"} for point in points)
    if len(points) < 2 or not only_rate or not scenario.slo.has_limits:
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
