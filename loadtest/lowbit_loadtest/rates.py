"""What is measured: a ramp's stages, a search's bisection, a sweep's combinations, or the scenario as it is.

A stage of a ramp and a rate of a search are chosen after the one before was measured. The search bisects on a
logarithmic scale for the highest rate that still meets the SLOs.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from lowbit_loadtest.report.result import Point, Seen, Setting, bracket, seen_rates
from lowbit_loadtest.scenario import Output, Scenario, Search
from lowbit_loadtest.sections.arrivals import Poisson, Ramp
from lowbit_loadtest.sections.distributions import Lengths


def settings_to_measure(scenario: Scenario, points: Sequence[Point]) -> Iterator[Setting]:
    """The settings to measure, one after the other; an empty one stands for the scenario as it is."""
    if isinstance(scenario.arrivals, Ramp):
        rate_rps = scenario.arrivals.start_rps
        while rate_rps <= scenario.arrivals.max_rps:
            yield {"rate_rps": rate_rps}
            if is_saturated(points[-1], scenario):
                return
            rate_rps *= scenario.arrivals.growth
    elif scenario.search is not None:
        while (next_rps := next_search_rate(scenario.search, seen_rates(scenario, points))) is not None:
            yield {"rate_rps": next_rps}
    elif scenario.sweep is not None:
        axes = scenario.sweep.axes
        for values in itertools.product(*axes.values()):
            yield dict(zip(axes, values, strict=True))
    else:
        yield {}


def at_setting(scenario: Scenario, setting: Setting) -> Scenario:
    """The scenario of one point: a stage of a ramp is Poisson."""
    changes: dict[str, Any] = {}
    if (rate_rps := setting.get("rate_rps")) is not None:
        if isinstance(scenario.arrivals, Ramp):
            changes["arrivals"] = Poisson(kind="poisson", rate_rps=rate_rps)
            changes["duration_s"] = scenario.arrivals.stage_s
        else:
            changes["arrivals"] = scenario.arrivals.model_copy(update={"rate_rps": rate_rps})
    if (concurrency := setting.get("concurrency")) is not None:
        changes["arrivals"] = scenario.arrivals.model_copy(update={"concurrency": int(concurrency)})
    if (tokens := setting.get("prompt_tokens")) is not None and scenario.prompts is not None:
        changes["prompts"] = scenario.prompts.model_copy(update={"tokens": Lengths(mean=tokens)})
    if (tokens := setting.get("output_tokens")) is not None:
        exact = scenario.output.exact if scenario.output else False
        changes["output"] = Output(tokens=Lengths(mean=tokens), exact=exact)
    return scenario.model_copy(update=changes)


def is_saturated(point: Point, scenario: Scenario) -> bool:
    """Whether a ramp ends with this stage."""
    assert isinstance(scenario.arrivals, Ramp)
    done_rps, offered_rps = point.summary.requests_per_s or 0.0, point.offered_rps or 0.0
    too_slow = done_rps < scenario.arrivals.saturation * _arrived_rps(point, offered_rps)
    return too_slow or not point.valid or (scenario.slo.has_limits and not point.meets(scenario))


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


def setting_for_quality(scenario: Scenario, points: Sequence[Point]) -> Setting:
    """The load under which quality is asked: of several, among those that met the SLOs, the highest rate, or in a sweep
    the one with the most tokens a second; or else the first, which is the lowest."""
    met = [point for point in points if not scenario.slo.has_limits or point.meets(scenario)]
    if not met:
        return points[0].setting
    if scenario.sweep is not None:
        return max(met, key=lambda point: point.summary.output_tokens_per_s or 0.0).setting
    return max(met, key=lambda point: point.setting.get("rate_rps", 0.0)).setting
