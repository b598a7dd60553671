"""Which rates are measured: a ramp's stages, a search's bisection, or the scenario's own rate.

Each is chosen after the one before was measured. The search bisects on a logarithmic scale for the highest rate that
still meets the SLOs.
"""

import math
from collections.abc import Iterator, Sequence

from lowbit_loadtest.report.result import Point, Seen, bracket, seen_rates
from lowbit_loadtest.scenario import Ramp, Scenario, Search


def rates_to_measure(scenario: Scenario, points: Sequence[Point]) -> Iterator[float | None]:
    """The rates to measure, one after the other; None stands for the scenario's own."""
    if isinstance(scenario.arrivals, Ramp):
        rate_rps = scenario.arrivals.start_rps
        while rate_rps <= scenario.arrivals.max_rps:
            yield rate_rps
            if is_saturated(points[-1], scenario):
                return
            rate_rps *= scenario.arrivals.growth
    elif scenario.search is not None:
        while True:
            next_rps = next_search_rate(scenario.search, seen_rates(scenario, points))
            if next_rps is None:
                return
            yield next_rps
    else:
        yield None


def is_saturated(point: Point, scenario: Scenario) -> bool:
    """Whether a ramp ends with this stage."""
    assert isinstance(scenario.arrivals, Ramp)
    done_rps, offered_rps = point.summary.requests_per_s or 0.0, point.offered_rps or 0.0
    too_slow = done_rps < scenario.arrivals.saturation * _arrived_rps(point, offered_rps)
    return too_slow or not point.valid or (bool(scenario.slo.limits_s) and not point.meets(scenario))


def _arrived_rps(point: Point, offered_rps: float) -> float:
    """The rate at which requests arrived, which in a short Poisson stage differs from the offered rate by chance."""
    seconds = sum(run.window.length_s for run in point.runs if run.window)
    arrived = sum(len(run.measured) for run in point.runs if run.window)
    return arrived / seconds if seconds else offered_rps


def next_search_rate(search: Search, seen: Seen) -> float | None:
    """The next rate to measure; None when the bracket is narrow enough, or an end of the range decides."""
    if not seen:
        return search.low_rps
    meets, fails = bracket(seen)
    if meets is None:
        return None  # not even the lowest
    if fails is None:
        return search.high_rps if meets < search.high_rps else None
    return None if fails / meets - 1 <= search.resolution else math.sqrt(meets * fails)


def rate_for_quality(scenario: Scenario, points: Sequence[Point]) -> float | None:
    """The rate of the load under which quality is asked: of several, the highest that met the SLOs, or else the lowest.

    None stands for the scenario's own.
    """
    if len(points) < 2:
        return points[0].offered_rps if isinstance(scenario.arrivals, Ramp) or scenario.search else None
    rates = [
        point.offered_rps or 0.0 for point in points if not scenario.slo.limits_s or point.meets(scenario)
    ]
    return max(rates, default=min(point.offered_rps or 0.0 for point in points))
