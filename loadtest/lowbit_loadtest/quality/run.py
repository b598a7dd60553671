"""Quality's story: ask everything idle, start the scenario's load, ask everything again, compare.

The load goes on until the last question is answered, then it is stopped: a closed loop starts over with its prompts, an
open loop with another repetition. Speed was
measured before: these runs' times are not reported.
"""

import asyncio
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from lowbit_core.evals.items import Item, Key
from lowbit_core.evals.scoring import Answer
from lowbit_loadtest.generate.driver import Share, Tally, Target, open_http
from lowbit_loadtest.generate.records import Interval, Outcome, RequestRecord
from lowbit_loadtest.generate.schedule import Plan, make_plan
from lowbit_loadtest.generate.tokens import find_counter
from lowbit_loadtest.generate.workers import OnRun, OnTally, run_workers, shares_of
from lowbit_loadtest.quality.questions import Exam, prepare, sit
from lowbit_loadtest.quality.verdict import Quality, examine
from lowbit_loadtest.scenario import Scenario

Answers = Mapping[Key, Answer]
MOST_LOAD_RUNS = 1000


def measure_quality(
    scenario: Scenario,
    items: Sequence[Item],
    target: Target,
    workers: int,
    rate_rps: float | None,
    on_run: OnRun,
    base: Answers | None = None,
) -> Quality | None:
    """Both sittings and what they say; None when interrupted."""
    assert scenario.quality is not None
    stop = threading.Event()
    try:
        exam = prepare(scenario.quality, items, target)
        on_run("quality, idle", None)
        idle = sit(exam, stop)
        load = _Load(scenario, target, workers, rate_rps)
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(_sit_under, exam, load, stop)
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
    return examine(
        idle,
        loaded,
        load.in_flight(),
        load.summary(),
        scenario.quality.tolerance,
        base,
        exam.unsupported,
    )


def _sit_under(exam: Exam, load: "_Load", stop: threading.Event) -> Any:
    load.started.wait()
    return sit(exam, stop)


@dataclass
class _Load:
    """The scenario's load, repeated until `over` is set; `started` once its first requests are out."""

    scenario: Scenario
    target: Target
    workers: int
    rate_rps: float | None
    started: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    interrupted: bool = False
    records: list[RequestRecord] = field(default_factory=list)
    seconds: float = 0.0

    def run(self, on_tally: OnTally) -> None:
        def heard(tally: Tally) -> None:
            if tally.in_flight or tally.outcomes:
                self.started.set()
            on_tally(tally)

        for number in range(MOST_LOAD_RUNS):
            if self.over.is_set() or self.interrupted:
                return
            plan = asyncio.run(self._plan(self.scenario.repetitions + number))
            ran = run_workers(shares_of(plan, self._share(plan), self.workers), heard, self.over)
            self.interrupted = ran.interrupted
            records = [record for one in ran.driven for record in one.records]
            self.records += records
            self.seconds += max((record.ended_s for record in records), default=ran.start_s) - ran.start_s

    async def _plan(self, repetition: int) -> Plan:
        async with open_http(self.target) as http:
            counter = await find_counter(http, self.target.model)
            plan = await make_plan(self.scenario, counter, repetition, self.rate_rps)
        return plan if plan.concurrency is None else replace(plan, repeats=True, length_s=None)

    def _share(self, plan: Plan) -> Share:
        output = self.scenario.output
        return Share(
            self.target,
            (),
            temperature=self.scenario.temperature,
            exact=output.exact if output else False,
            repeats=plan.repeats,
            length_s=plan.length_s,
            think_s=plan.think_s,
        )

    def in_flight(self) -> list[Interval]:
        return [Interval(record.sent_s, record.ended_s) for record in self.records]

    def summary(self) -> dict[str, Any]:
        completed = [record for record in self.records if record.outcome is Outcome.COMPLETED]
        tokens = sum(record.output_tokens or 0 for record in completed)
        return {
            "offered_rps": self.rate_rps,
            "seconds": self.seconds,
            "requests": len(self.records),
            "completed": len(completed),
            "output_tokens_per_s": tokens / self.seconds if self.seconds else None,
        }
