"""The load test's story: find the model, schedule each run, let the workers send it, sum up; again for each setting.

Open loop: users do not wait for one another, so requests go out when they are due. Closed loop: each of C streams
sends its next request when its last one has ended, so the server sets the pace, and its queueing does not show.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowbit_core.errors import ConfigError
from lowbit_loadtest.generate.endpoints import endpoint_named
from lowbit_loadtest.generate.http.target import Target, open_http
from lowbit_loadtest.generate.part import WHOLE, Part, digest, own_part
from lowbit_loadtest.generate.planner import make_schedule, whole_share
from lowbit_loadtest.generate.preflight import find_model
from lowbit_loadtest.generate.schedule import Schedule
from lowbit_loadtest.generate.tokens import find_counter
from lowbit_loadtest.generate.workers import OnRun, OnTally, default_workers, run_workers, shares_of
from lowbit_loadtest.knees import knees_of
from lowbit_loadtest.measured import Measured, Sent, make_point
from lowbit_loadtest.quality.questions import read_items
from lowbit_loadtest.quality.run import Answers, measure_quality
from lowbit_loadtest.rates import at_setting, setting_for_quality, settings_to_measure
from lowbit_loadtest.report.result import Point, Result, Setting
from lowbit_loadtest.report.server_metrics import Scraper
from lowbit_loadtest.scenario import Scenario

SPAWN_S = 15.0  # workers are started so long before a given start
PAUSE_S = 30.0  # between the planned end of a run and the start of the next, where starts are planned


@dataclass(frozen=True)
class Ran:
    """A load test, and what it sent in full, from which parts are joined."""

    result: Result
    measured: tuple[Measured, ...]


@dataclass
class Starts:
    """When runs start, in seconds since 1970: at once, or from a moment on at times that every part knows."""

    next_s: float | None
    taken: int = 0

    def take(self, schedule: Schedule, is_last: bool) -> float | None:
        """This run's start; the next one's is a pause after this one's planned end."""
        start_s = self.next_s
        self.taken += 1
        if start_s is not None and self.taken == 1 and (late_s := time.time() - start_s) > 0:
            raise ConfigError(
                f"--start-at is over since {late_s:.0f} s; give a later moment, the same to all parts"
            )
        if start_s is not None and not is_last:
            if (length_s := schedule.planned_s) is None:
                raise ConfigError(
                    "--start-at with several runs needs to know how long each is; give duration_s instead of requests"
                )
            self.next_s = start_s + length_s + PAUSE_S
        return start_s


def run_load_test(scenario: Scenario, target: Target, on_run: OnRun, base: Answers | None = None) -> Result:
    """Run a scenario to its end, or to Ctrl-C. Quality is asked last, so that it does not slow what is timed.

    `base` has another run's answers, which the answers are compared with. Raises ConfigError before the first request.
    """
    return run_part(scenario, target, on_run, base).result


def run_part(
    scenario: Scenario,
    target: Target,
    on_run: OnRun,
    base: Answers | None = None,
    part: Part = WHOLE,
    start_at_s: float | None = None,
) -> Ran:
    """Run one machine's part of a scenario, the whole unless told otherwise; `start_at_s` is in seconds since 1970."""
    _check_part(scenario, part)
    items = read_items(scenario.quality) if scenario.quality else []
    target = replace(target, model=scenario.model or "", timeout_s=scenario.timeout_s)
    target = replace(target, model=asyncio.run(_find_model(target)))
    workers = scenario.generator.workers or default_workers()
    starts = Starts(start_at_s)
    points: list[Point] = []
    measured: list[Measured] = []
    counted_by, interrupted, recording = "server", False, None
    for stage, setting in enumerate(settings_to_measure(scenario, points)):
        condition = at_setting(scenario, setting)
        schedules, counted_by = asyncio.run(_schedules(condition, target, stage))
        recording = schedules[0].recording
        is_last = scenario.sweep is None or stage + 1 == scenario.sweep.points
        sent = _send(condition, target, schedules, workers, on_run, setting, part, starts, is_last)
        measured.append(Measured(setting, schedules[0].offered_rps, tuple((one,) for one in sent)))
        points.append(make_point(condition, measured[-1]))
        if interrupted := sent[-1].interrupted:
            break
    quality = None
    if scenario.quality is not None and not interrupted:
        condition = at_setting(scenario, setting_for_quality(scenario, points))
        quality = measure_quality(condition, items, target, workers, on_run, base)
        interrupted = quality is None
    knees = knees_of(scenario, points)
    result = Result(target, tuple(points), workers, counted_by, interrupted, quality, recording, knees=knees)
    return Ran(result, tuple(measured))


def _check_part(scenario: Scenario, part: Part) -> None:
    if part == WHOLE:
        return
    if scenario.search is not None or scenario.arrivals.kind == "ramp":
        raise ConfigError(
            f"--part {part}: a search or a ramp chooses its rates by what it sees, and a part sees only its own; "
            "give sweep: {rate_rps: […]}"
        )
    if scenario.quality is not None:
        raise ConfigError(f"--part {part}: quality is asked from one machine; leave quality out")


def _send(
    scenario: Scenario,
    target: Target,
    schedules: Sequence[Schedule],
    workers: int,
    on_run: OnRun,
    setting: Setting,
    part: Part,
    starts: Starts,
    is_last: bool,
) -> list[Sent]:
    """The repetitions of one setting, up to one that is interrupted."""
    sent: list[Sent] = []
    for repetition, schedule in enumerate(schedules, 1):
        own = own_part(schedule, part)
        start_at_s = starts.take(schedule, is_last and repetition == len(schedules))
        title = _title(schedule, setting, repetition, len(schedules))
        on_tally = on_run(title if part == WHOLE else f"part {part}: {title}", own.requests)
        one = _send_once(scenario, target, own, workers, on_tally, start_at_s)
        sent.append(replace(one, plan=digest(schedule)) if part.of > 1 else one)
        if one.interrupted:
            break
    return sent


def _send_once(
    scenario: Scenario,
    target: Target,
    schedule: Schedule,
    workers: int,
    on_tally: OnTally,
    start_at_s: float | None,
) -> Sent:
    if start_at_s is not None:
        time.sleep(max(0.0, start_at_s - time.time() - SPAWN_S))
    with Scraper(target) as scraper:
        shares = shares_of(schedule, whole_share(scenario, target, schedule), workers)
        ran = run_workers(shares, on_tally, numbers=(schedule.first, schedule.step), start_at_s=start_at_s)
    return Sent(
        ran.records,
        ran.start_s,
        ran.started_unix_s,
        "",
        schedule.requests,
        schedule.concurrency,
        schedule.length_s,
        ran.heartbeat_lags_s,
        ran.lost_workers,
        ran.interrupted,
        tuple(scraper.samples),
        tuple(scraper.times_s),
    )


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
    endpoint = endpoint_named(target.endpoint)
    if not endpoint.takes_tools and any(job.tools for schedule in schedules for job in schedule.jobs):
        raise ConfigError(
            f"the prompts have tools, which /v1/{endpoint.path} does not take; ask /v1/chat/completions"
        )
    return schedules, counter.name


def _title(schedule: Schedule, setting: Setting, repetition: int, repetitions: int) -> str:
    offered = f"{schedule.offered_rps:.3g} requests/s" if schedule.offered_rps else None
    lengths = [f"{setting[name]:g} {name.replace('_', ' ')}" for name in setting if name.endswith("_tokens")]
    title = ", ".join([offered or f"{schedule.concurrency or len(schedule.jobs)} streams", *lengths])
    return f"{title}, repetition {repetition} of {repetitions}" if repetitions > 1 else title
