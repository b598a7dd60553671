"""The load test's story: find the model, schedule each run, let the workers send it, sum up; again for each rate.

Open loop: users do not wait for one another, so requests go out when they are due. Closed loop: each of C streams
sends its next request when its last one has ended, so the server sets the pace, and its queueing does not show.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowbit_loadtest.arrival_kinds import AtOnce
from lowbit_loadtest.generate.http.target import Target, open_http
from lowbit_loadtest.generate.planner import make_schedule, whole_share
from lowbit_loadtest.generate.preflight import find_model
from lowbit_loadtest.generate.schedule import Schedule
from lowbit_loadtest.generate.tokens import find_counter
from lowbit_loadtest.generate.workers import (
    OnRun,
    OnTally,
    WorkersResult,
    default_workers,
    run_workers,
    shares_of,
)
from lowbit_loadtest.quality.questions import read_items
from lowbit_loadtest.quality.run import Answers, measure_quality
from lowbit_loadtest.rates import at_setting, setting_for_quality, settings_to_measure
from lowbit_loadtest.report.result import Point, Result, Setting
from lowbit_loadtest.report.server_metrics import Scraper, UsageCheck, check_usage
from lowbit_loadtest.report.sessions import sessions_of
from lowbit_loadtest.report.summary import (
    Run,
    Summary,
    arrival_window,
    steady_interval,
    summarize,
    whole_span,
)
from lowbit_loadtest.scenario import Scenario


@dataclass(frozen=True)
class _Measured:
    """One repetition, with what the server says of it itself."""

    run: Run
    server: dict[str, Any] | None
    usage: UsageCheck | None
    interrupted: bool
    lost_workers: int


def run_load_test(scenario: Scenario, target: Target, on_run: OnRun, base: Answers | None = None) -> Result:
    """Run a scenario to its end, or to Ctrl-C. Quality is asked last, so that it does not slow what is timed.

    `base` has another run's answers, which the answers are compared with. Raises ConfigError before the first request.
    """
    items = read_items(scenario.quality) if scenario.quality else []
    target = replace(target, model=scenario.model or "", timeout_s=scenario.timeout_s)
    target = replace(target, model=asyncio.run(_find_model(target)))
    workers = scenario.generator.workers or default_workers()
    points: list[Point] = []
    counted_by, interrupted, recording = "server", False, None
    for stage, setting in enumerate(settings_to_measure(scenario, points)):
        condition = at_setting(scenario, setting)
        schedules, counted_by = asyncio.run(_schedules(condition, target, stage))
        recording = schedules[0].recording
        measured = _measure(condition, target, schedules, workers, on_run, setting)
        points.append(_point(condition, schedules[0].offered_rps, measured, setting))
        if interrupted := measured[-1].interrupted:
            break
    quality = None
    if scenario.quality is not None and not interrupted:
        condition = at_setting(scenario, setting_for_quality(scenario, points))
        quality = measure_quality(condition, items, target, workers, on_run, base)
        interrupted = quality is None
    return Result(target, tuple(points), workers, counted_by, interrupted, quality, recording)


def _measure(
    scenario: Scenario,
    target: Target,
    schedules: Sequence[Schedule],
    workers: int,
    on_run: OnRun,
    setting: Setting,
) -> list[_Measured]:
    """The repetitions of one setting, up to one that is interrupted."""
    measured: list[_Measured] = []
    for repetition, schedule in enumerate(schedules, 1):
        on_tally = on_run(_title(schedule, setting, repetition, len(schedules)), schedule.requests)
        measured.append(_measure_once(scenario, target, schedule, workers, on_tally))
        if measured[-1].interrupted:
            break
    return measured


def _measure_once(
    scenario: Scenario, target: Target, schedule: Schedule, workers: int, on_tally: OnTally
) -> _Measured:
    with Scraper(target) as scraper:
        ran = run_workers(shares_of(schedule, whole_share(scenario, target, schedule), workers), on_tally)
    server, run = scraper.summary(), make_run(scenario, schedule, ran)
    return _Measured(run, server, check_usage(server, run.records), ran.interrupted, ran.lost_workers)


def make_run(scenario: Scenario, schedule: Schedule, ran: WorkersResult) -> Run:
    """The workers' records, with the window that rates are computed over."""
    records = ran.records
    not_sent = 0 if schedule.requests is None else schedule.requests - len(records)
    closed = schedule.concurrency is not None and max(len(job.turns) for job in schedule.jobs) == 1
    if isinstance(scenario.arrivals, AtOnce):
        window, closed = whole_span(records), False
    elif schedule.concurrency is not None and closed:
        window = steady_interval(records, schedule.concurrency)
    else:
        window = arrival_window(records, ran.start_s + schedule.length_s if schedule.length_s else None)
    return Run(records, window, closed, not_sent, ran.heartbeat_lags_s)


def _point(
    scenario: Scenario, offered_rps: float | None, measured: Sequence[_Measured], setting: Setting
) -> Point:
    runs = tuple(one.run for one in measured)
    summary = summarize(runs, scenario.slo)
    reasons = [f"{one.lost_workers} worker processes died" for one in measured if one.lost_workers]
    reasons += _too_late(summary, scenario.generator.max_lag_s)
    server = tuple(one.server for one in measured if one.server is not None)
    usage = tuple(one.usage for one in measured if one.usage is not None)
    has_sessions = any(record.turns > 1 for run in runs for record in run.records)
    sessions = sessions_of(runs, scenario.slo) if has_sessions or scenario.slo.session_s else None
    return Point(offered_rps, runs, summary, not reasons, tuple(reasons), server, usage, setting, sessions)


def _too_late(summary: Summary, max_lag_s: float) -> list[str]:
    lags = {"sends were late": summary.lag_s.send_p99, "the event loops were late": summary.lag_s.loop_p99}
    return [
        f"{name}: p99 {1000 * lag_s:.1f} ms is above {1000 * max_lag_s:g} ms"
        for name, lag_s in lags.items()
        if lag_s is not None and lag_s > max_lag_s
    ]


async def _find_model(target: Target) -> str:
    async with open_http(target) as http:
        return await find_model(http, target)


async def _schedules(scenario: Scenario, target: Target, stage: int) -> tuple[list[Schedule], str]:
    async with open_http(target) as http:
        counter = await find_counter(http, target)
        schedules = [
            await make_schedule(scenario, counter, repetition, stage)
            for repetition in range(scenario.repetitions)
        ]
    return schedules, counter.name


def _title(schedule: Schedule, setting: Setting, repetition: int, repetitions: int) -> str:
    offered = f"{schedule.offered_rps:.3g} requests/s" if schedule.offered_rps else None
    lengths = [f"{setting[name]:g} {name.replace('_', ' ')}" for name in setting if name.endswith("_tokens")]
    title = ", ".join([offered or f"{schedule.concurrency or len(schedule.jobs)} streams", *lengths])
    return f"{title}, repetition {repetition} of {repetitions}" if repetitions > 1 else title
