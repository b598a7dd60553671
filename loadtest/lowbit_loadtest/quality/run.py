"""Quality's story: ask everything idle, start the scenario's load, ask everything again, compare.

The load runs until the last question is answered: a closed loop starts over with its prompts, an open loop with another
repetition. Its latencies are not reported; speed was measured before.
"""

import asyncio
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from lowbit_core.evals.items import Item, Key
from lowbit_core.evals.scoring import Answer
from lowbit_loadtest.generate.driver import Tally
from lowbit_loadtest.generate.http.target import Target, open_http
from lowbit_loadtest.generate.planner import make_schedule, whole_share
from lowbit_loadtest.generate.records import Interval, Outcome, RequestRecord
from lowbit_loadtest.generate.schedule import Schedule
from lowbit_loadtest.generate.tokens import find_counter
from lowbit_loadtest.generate.workers import OnRun, OnTally, run_workers, shares_of
from lowbit_loadtest.quality.questions import QuestionSet, ask_all, prepare
from lowbit_loadtest.quality.verdict import QualityResult, Responses, compare_responses
from lowbit_loadtest.scenario import Scenario

Answers = Mapping[Key, Answer]
MOST_LOAD_RUNS = 1000


def measure_quality(
    scenario: Scenario,
    items: Sequence[Item],
    target: Target,
    workers: int,
    on_run: OnRun,
    base: Answers | None = None,
) -> QualityResult | None:
    """Ask idle and under load, and compare; None when interrupted."""
    assert scenario.quality is not None
    stop = threading.Event()
    try:
        asked = prepare(scenario.quality, items, target)
        on_run("quality, idle", None)
        idle = ask_all(asked, stop)
        load = _Load(scenario, target, workers)
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(_ask_under_load, asked, load, stop)
            future.add_done_callback(lambda _: load.over.set())
            try:
                load.run(on_run("quality, under load", None))
            finally:
                stop.set()
                load.started.set()
            loaded = future.result()
    except KeyboardInterrupt:
        return None
    if load.interrupted:
        return None
    return compare_responses(
        idle,
        loaded,
        load.in_flight(),
        load.summary(),
        scenario.quality.tolerance,
        base,
        asked.unsupported,
    )


def _ask_under_load(asked: QuestionSet, load: "_Load", stop: threading.Event) -> Responses:
    load.started.wait()
    return ask_all(asked, stop)


@dataclass
class _Load:
    """The scenario's load, repeated until `over` is set; `started` is set once its first requests are sent."""

    scenario: Scenario
    target: Target
    workers: int
    offered_rps: float | None = None
    started: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    interrupted: bool = False
    records: list[RequestRecord] = field(default_factory=list)
    seconds: float = 0.0

    def run(self, on_tally: OnTally) -> None:
        def tell(tally: Tally) -> None:
            if tally.in_flight or tally.outcomes:
                self.started.set()
            on_tally(tally)

        for number in range(MOST_LOAD_RUNS):
            if self.over.is_set() or self.interrupted:
                return
            schedule = asyncio.run(self._schedule(self.scenario.repetitions + number))
            share = whole_share(self.scenario, self.target, schedule)
            ran = run_workers(shares_of(schedule, share, self.workers), tell, self.over)
            self.interrupted = ran.interrupted
            records = ran.records
            self.records += records
            self.seconds += max((record.ended_s for record in records), default=ran.start_s) - ran.start_s

    async def _schedule(self, repetition: int) -> Schedule:
        async with open_http(self.target) as http:
            counter = await find_counter(http, self.target)
            schedule = await make_schedule(self.scenario, counter, repetition)
        self.offered_rps = schedule.offered_rps
        return schedule if schedule.concurrency is None else replace(schedule, repeats=True, length_s=None)

    def in_flight(self) -> list[Interval]:
        return [Interval(record.sent_s, record.ended_s) for record in self.records]

    def summary(self) -> dict[str, Any]:
        completed = [record for record in self.records if record.outcome is Outcome.COMPLETED]
        tokens = sum(record.output_tokens or 0 for record in completed)
        return {
            "offered_rps": self.offered_rps,
            "seconds": self.seconds,
            "requests": len(self.records),
            "completed": len(completed),
            "output_tokens_per_s": tokens / self.seconds if self.seconds else None,
        }
