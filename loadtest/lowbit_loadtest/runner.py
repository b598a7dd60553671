"""The load test's story: find the model, plan each run, let the workers send it, sum up; again for each rate.

Open loop: users do not wait for one another, so requests go out when they are due. Closed loop: each of C streams
sends its next request when its last one has ended, so the server sets the pace, and its queueing does not show.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from lowbit_loadtest.generate.client import ChatClient
from lowbit_loadtest.generate.driver import Share, Target, open_http
from lowbit_loadtest.generate.schedule import Plan, make_plan
from lowbit_loadtest.generate.tokens import find_counter
from lowbit_loadtest.generate.workers import OnRun, OnTally, Ran, default_workers, run_workers, shares_of
from lowbit_loadtest.quality.questions import read_items
from lowbit_loadtest.quality.run import Answers, measure_quality
from lowbit_loadtest.rates import rate_for_quality, rates_to_measure
from lowbit_loadtest.report.result import Point, Result
from lowbit_loadtest.report.server_metrics import Scraper, UsageCheck, check_usage
from lowbit_loadtest.report.summary import Run, Summary, arrival_window, steady_interval, summarize
from lowbit_loadtest.scenario import Conversations, Scenario


def run_load_test(
    scenario: Scenario, target_url: str, api_key: str | None, on_run: OnRun, base: Answers | None = None
) -> Result:
    """Run a scenario to its end, or to Ctrl-C; quality is asked last, so that it does not slow what is timed.

    `base` are answers of another run to judge quality against. Raises ConfigError before the first request.
    """
    items = read_items(scenario.quality) if scenario.quality else []
    model = asyncio.run(_find_model(scenario, target_url, api_key))
    target = Target(target_url, model, api_key, scenario.timeout_s)
    workers = scenario.generator.workers or default_workers()
    points: list[Point] = []
    counted_by, interrupted = "server", False
    for stage, rate_rps in enumerate(rates_to_measure(scenario, points)):
        plans, counted_by = asyncio.run(_plans(scenario, target, rate_rps, stage))
        runs, extras, reasons = [], [], []
        for repetition, plan in enumerate(plans, 1):
            on_tally = on_run(_title(plan, repetition, len(plans)), plan.requests)
            run, extra, ran = _run_once(scenario, target, plan, workers, on_tally)
            runs.append(run)
            extras.append(extra)
            reasons += [f"{ran.lost_workers} worker processes died"] if ran.lost_workers else []
            if interrupted := ran.interrupted:
                break
        points.append(_point(scenario, plans[0].offered_rps, runs, extras, reasons))
        if interrupted:
            break
    quality = None
    if scenario.quality is not None and not interrupted:
        rate_rps = rate_for_quality(scenario, points)
        quality = measure_quality(scenario, items, target, workers, rate_rps, on_run, base)
        interrupted = quality is None
    return Result(target, tuple(points), workers, counted_by, interrupted, quality)


def _run_once(
    scenario: Scenario, target: Target, plan: Plan, workers: int, on_tally: OnTally
) -> tuple[Run, tuple[dict[str, Any] | None, UsageCheck | None], Ran]:
    output = scenario.output
    share = Share(
        target,
        (),
        temperature=scenario.temperature,
        exact=output.exact if output else False,
        repeats=plan.repeats,
        length_s=plan.length_s,
        think_s=plan.think_s,
        warm_up_requests=plan.warm_up_requests,
        warm_up_s=plan.warm_up_s,
    )
    with Scraper(target) as scraper:
        ran = run_workers(shares_of(plan, share, workers), on_tally)
    server = scraper.summary()
    run = make_run(scenario, plan, ran)
    return run, (server, check_usage(server, list(run.records))), ran


def make_run(scenario: Scenario, plan: Plan, ran: Ran) -> Run:
    """Joins the workers' records and finds the window of the rates."""
    records = sorted(
        (record for one in ran.driven for record in one.records), key=lambda record: record.due_s
    )
    lags_s = tuple(lag_s for one in ran.driven for lag_s in one.heartbeat_lags_s)
    not_sent = 0 if plan.requests is None else plan.requests - len(records)
    closed = plan.concurrency is not None and not isinstance(scenario.prompts, Conversations)
    if plan.concurrency is not None and closed:
        window = steady_interval(records, plan.concurrency)
    else:
        window = arrival_window(records, ran.start_s + plan.length_s if plan.length_s else None)
    return Run(tuple(records), window, closed, not_sent, lags_s)


def _point(
    scenario: Scenario,
    offered_rps: float | None,
    runs: Sequence[Run],
    extras: Sequence[tuple[dict[str, Any] | None, UsageCheck | None]],
    reasons: Sequence[str],
) -> Point:
    summary = summarize(runs, scenario.slo)
    because = [*reasons, *_too_late(summary, scenario.generator.max_lag_s)]
    server = tuple(one for one, _ in extras if one is not None)
    usage = tuple(check for _, check in extras if check is not None)
    return Point(offered_rps, tuple(runs), summary, not because, tuple(because), server, usage)


def _too_late(summary: Summary, max_lag_s: float) -> list[str]:
    lags = {"sends were late": summary.lag_s.send_p99, "the event loops were late": summary.lag_s.loop_p99}
    return [
        f"{name}: p99 {1000 * lag_s:.1f} ms is above {1000 * max_lag_s:g} ms"
        for name, lag_s in lags.items()
        if lag_s is not None and lag_s > max_lag_s
    ]


async def _find_model(scenario: Scenario, url: str, api_key: str | None) -> str:
    async with open_http(Target(url, "", api_key)) as http:
        return await ChatClient(http, scenario.timeout_s).find_model(scenario.model)


async def _plans(
    scenario: Scenario, target: Target, rate_rps: float | None, stage: int
) -> tuple[list[Plan], str]:
    async with open_http(target) as http:
        counter = await find_counter(http, target.model)
        plans = [
            await make_plan(scenario, counter, repetition, rate_rps, stage)
            for repetition in range(scenario.repetitions)
        ]
    return plans, counter.name


def _title(plan: Plan, repetition: int, repetitions: int) -> str:
    rate = f"{plan.offered_rps:.3g} requests/s" if plan.offered_rps else f"{plan.concurrency} streams"
    return f"{rate}, repetition {repetition} of {repetitions}" if repetitions > 1 else rate
