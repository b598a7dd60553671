"""Sends one share of a schedule from one event loop, on time or in a closed loop, and measures its own lag.

Open loop: a job is sent at its time, whether or not earlier ones have ended. asyncio's timers are up to 1 ms late, so
the last millisecond before a send is spent polling the loop. Every request carries the time at which it was due. The
lag has two parts: how late requests were sent, and how late a heartbeat every 10 ms came, which is how long an arriving
chunk may have waited for its time stamp.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from lowbit_loadtest.generate.client import Client, Clock
from lowbit_loadtest.generate.http.target import Target
from lowbit_loadtest.generate.records import Outcome, RequestRecord
from lowbit_loadtest.generate.request import Message, Request
from lowbit_loadtest.generate.schedule import Job

HEARTBEAT_S = 0.01
TIMER_SLACK_S = 0.0012  # epoll rounds up to whole milliseconds


@dataclass(frozen=True)
class Share:
    """One worker's part of a run; `streams` is its part of a closed loop's concurrency, 0 in an open loop."""

    target: Target
    jobs: tuple[Job, ...]
    temperature: float = 0.0
    exact: bool = False
    streams: int = 0
    repeats: bool = False
    length_s: float | None = None
    warm_up_requests: int = 0
    warm_up_s: float = 0.0


@dataclass
class Tally:
    """What a share has done so far; shown while it runs."""

    in_flight: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    output_tokens: int = 0


@dataclass(frozen=True)
class ShareResult:
    """A share's requests, how late the heartbeat was each time, and how many turns were scheduled and not sent."""

    records: tuple[RequestRecord, ...]
    heartbeat_lags_s: tuple[float, ...]
    not_sent: int


NextNumber = Callable[[], int]


class Driver:
    """Runs one share."""

    def __init__(
        self, share: Share, client: Client, start_s: float, tally: Tally, clock: Clock = time.monotonic
    ) -> None:
        self._share = share
        self._client = client
        self._start_s = start_s
        self._tally = tally
        self._clock = clock
        self._records: list[RequestRecord] = []
        self._stopping = False

    async def run(self, stop: asyncio.Event, next_number: NextNumber | None = None) -> ShareResult:
        """Run to the end, or until `stop` is set: then nothing more is sent, and requests in flight are cut off.

        `next_number` numbers the jobs of a closed loop, over all processes.
        """
        lags_s: list[float] = []
        heartbeat = asyncio.create_task(_heartbeat(lags_s, self._clock))
        work = asyncio.create_task(
            self._closed_loop(next_number or itertools.count().__next__)
            if self._share.streams
            else self._open_loop()
        )
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        self._stopping = (
            True  # a cancelled request ends as a record, so its stream must be told not to send the next
        )
        for task in (work, heartbeat, stopped):
            if not task.done():
                task.cancel()
        (failure, *_) = await asyncio.gather(work, heartbeat, stopped, return_exceptions=True)
        if isinstance(failure, Exception):
            raise failure
        return ShareResult(tuple(self._records), tuple(lags_s), self._not_sent())

    def _not_sent(self) -> int:
        """Scheduled turns without a record. A closed loop's jobs belong to all workers, so the runner counts them."""
        if self._share.streams:
            return 0
        return sum(len(job.turns) for job in self._share.jobs) - len(self._records)

    async def _open_loop(self) -> None:
        tasks: set[asyncio.Task[None]] = set()
        try:
            for job in self._share.jobs:
                due_s = self._start_s + (job.at_s or 0.0)
                await sleep_until(due_s, self._clock)
                task = asyncio.create_task(self._converse(job, job.index, job.seed, due_s))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            while tasks:
                await asyncio.wait(tasks)
        finally:
            await _cancel(tasks)

    async def _closed_loop(self, next_number: NextNumber) -> None:
        await sleep_until(self._start_s, self._clock)
        tasks = {asyncio.create_task(self._stream(next_number)) for _ in range(self._share.streams)}
        try:
            await asyncio.gather(*tasks)
        finally:
            await _cancel(tasks)

    async def _stream(self, next_number: NextNumber) -> None:
        for number, job, seed in self._dealt(next_number):
            await self._converse(job, number, seed, None)

    def _dealt(self, next_number: NextNumber) -> Iterator[tuple[int, Job, int]]:
        jobs, share = self._share.jobs, self._share
        seeds = sum(len(job.turns) for job in jobs)
        while not self._stopping and (
            share.length_s is None or self._clock() < self._start_s + share.length_s
        ):
            number = next_number()
            if number >= len(jobs) and not share.repeats:
                return
            job = jobs[number % len(jobs)]
            yield number, job, job.seed + seeds * (number // len(jobs))

    async def _converse(self, job: Job, number: int, seed: int, due_s: float | None) -> None:
        """Send the job's turns, each its pause after the answer before it, until one does not complete."""
        messages: tuple[Message, ...] = ()
        ended_s: float | None = None
        for position, turn in enumerate(job.turns):
            if ended_s is not None:
                due_s = ended_s + turn.pause_s
                await sleep_until(due_s, self._clock)
            messages += turn.messages
            more = position + 1 < len(job.turns)
            request = Request(
                messages, turn.max_tokens, self._share.temperature, seed + position, self._share.exact, more,
                number, position, tools=job.tools,
            )  # fmt: skip
            record = await self._send(request, due_s, len(job.turns))
            if record.outcome is not Outcome.COMPLETED:
                return
            messages += ({"role": "assistant", "content": record.text, **(turn.answer or {})},)
            ended_s = record.ended_s

    async def _send(self, request: Request, due_s: float | None, turns: int) -> RequestRecord:
        self._tally.in_flight += 1
        record = await self._client.complete(request, due_s)
        self._tally.in_flight -= 1
        share = self._share
        early = record.due_s < self._start_s + share.warm_up_s or request.index < share.warm_up_requests
        kept = replace(record, warm_up=early, turns=turns, text="")
        self._records.append(kept)
        self._tally.outcomes[kept.outcome.value] = self._tally.outcomes.get(kept.outcome.value, 0) + 1
        self._tally.output_tokens += kept.output_tokens or 0
        return record


async def sleep_until(due_s: float, clock: Clock = time.monotonic) -> None:
    """Wake at `due_s` rather than at the next tick of a timer."""
    if (left_s := due_s - clock()) > TIMER_SLACK_S:
        await asyncio.sleep(left_s - TIMER_SLACK_S)
    while clock() < due_s:
        await asyncio.sleep(0)


async def _heartbeat(lags_s: list[float], clock: Clock) -> None:
    """How late the event loop is: by how much a timer that is due finds its turn later."""
    while True:
        due_s = clock() + HEARTBEAT_S
        await asyncio.sleep(HEARTBEAT_S)
        lags_s.append(max(0.0, clock() - due_s))


async def _cancel(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
