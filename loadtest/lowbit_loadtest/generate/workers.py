"""Worker processes: each sends its share from an interpreter of its own, because a busy event loop measures its own
delays.

Processes are spawned, not forked. Each gets its share over a pipe and says when it is ready; all start at one moment of
the machine's monotonic clock, report counts four times a second, and send their records at the end. They ignore Ctrl-C;
the parent tells them to stop.
"""

import asyncio
import gc
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from threading import Event
from typing import Any

from lowbit_core.errors import LowbitError
from lowbit_loadtest.generate.client import Client
from lowbit_loadtest.generate.driver import Driver, Share, ShareResult, Tally
from lowbit_loadtest.generate.http.target import open_http
from lowbit_loadtest.generate.records import RequestRecord
from lowbit_loadtest.generate.schedule import Schedule

TALLY_EVERY_S = 0.25
START_TIMEOUT_S = 120.0
STARTS_IN_S = 0.1
LEAD_S = 0.5  # workers are told a start at a given time so long before it
STOP_TIMEOUT_S = 15.0

OnTally = Callable[[Tally], None]
OnRun = Callable[[str, int | None], OnTally]  # a run begins: its title, and how many requests it has


@dataclass(frozen=True)
class WorkersResult:
    """What all workers did together; nothing is known of the requests of `lost_workers`, which died."""

    shares: tuple[ShareResult, ...]
    start_s: float
    interrupted: bool = False
    lost_workers: int = 0
    started_unix_s: float = 0.0  # the same moment on the clock that machines share

    @property
    def records(self) -> tuple[RequestRecord, ...]:
        """All requests, in order of the times at which they were due."""
        records = (record for share in self.shares for record in share.records)
        return tuple(sorted(records, key=lambda record: record.due_s))

    @property
    def heartbeat_lags_s(self) -> tuple[float, ...]:
        return tuple(lag_s for share in self.shares for lag_s in share.heartbeat_lags_s)


def shares_of(schedule: Schedule, share: Share, workers: int) -> list[Share]:
    """The schedule dealt over workers: in an open loop its jobs, in a closed loop its streams, which share the jobs."""
    if schedule.concurrency is None:
        parts = [schedule.jobs[worker::workers] for worker in range(workers)]
        return [replace(share, jobs=jobs) for jobs in parts if jobs]
    streams = [len(range(worker, schedule.concurrency, workers)) for worker in range(workers)]
    return [replace(share, jobs=schedule.jobs, streams=count) for count in streams if count]


def default_workers(cpus: int | None = None) -> int:
    """Half of the CPUs this process may use, at least one and at most eight."""
    allowed = cpus or (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, min(8, allowed // 2))


def run_workers(
    shares: Sequence[Share],
    on_tally: OnTally,
    until: Event | None = None,
    numbers: tuple[int, int] = (0, 1),
    start_at_s: float | None = None,
) -> WorkersResult:
    """Run every share in its own process, to the end, until Ctrl-C, or until the event `until` is set. The records so
    far are returned in any case.

    `numbers` are the first job of a closed loop and how many further the next one is; `start_at_s` is when to start, in
    seconds since 1970.
    """
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    pairs = [context.Pipe() for _ in shares]
    processes = [
        context.Process(target=_work, args=(theirs, share, counter, numbers), daemon=True)
        for (_, theirs), share in zip(pairs, shares, strict=True)
    ]
    for process, (_, theirs) in zip(processes, pairs, strict=True):
        process.start()
        theirs.close()
    ours = [mine for mine, _ in pairs]
    try:
        start_s = _start_together(ours, start_at_s)
        return _collect(ours, start_s, on_tally, until or Event())
    finally:
        for process in processes:
            process.join(timeout=1.0)
            if process.is_alive():
                process.kill()
                process.join()


def _start_together(pipes: Sequence[Connection], start_at_s: float | None) -> float:
    for pipe in pipes:
        if not pipe.poll(START_TIMEOUT_S):
            raise LowbitError(f"a worker process did not start within {START_TIMEOUT_S:g} s")
        try:
            pipe.recv()
        except EOFError:
            raise LowbitError("a worker process died while it started") from None
    waits_s = STARTS_IN_S
    if start_at_s is not None:
        time.sleep(max(0.0, start_at_s - time.time() - LEAD_S))  # heartbeats of waiting are no one's
        waits_s = max(STARTS_IN_S, start_at_s - time.time())
    start_s = time.monotonic() + waits_s
    for pipe in pipes:
        pipe.send(start_s)
    return start_s


def _collect(pipes: Sequence[Connection], start_s: float, on_tally: OnTally, until: Event) -> WorkersResult:
    """Read the pipes until each worker has sent its `ShareResult` or is gone."""
    started_unix_s = time.time() + (start_s - time.monotonic())
    tallies: dict[Connection, Tally] = {}
    results: list[ShareResult] = []
    open_pipes = list(pipes)
    interrupted, told, give_up_s = False, False, float("inf")
    while open_pipes and time.monotonic() < give_up_s:
        if until.is_set() and not told:
            told, give_up_s = True, time.monotonic() + STOP_TIMEOUT_S
            _tell_to_stop(open_pipes)
        try:
            for pipe in wait(open_pipes, timeout=0.5):
                assert isinstance(pipe, Connection)
                message = _received(pipe)
                if isinstance(message, Tally):
                    tallies[pipe] = message
                    on_tally(_sum(list(tallies.values())))
                    continue
                if isinstance(message, ShareResult):
                    results.append(message)
                open_pipes.remove(pipe)
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted, told, give_up_s = True, True, time.monotonic() + STOP_TIMEOUT_S
            _tell_to_stop(open_pipes)
    return WorkersResult(tuple(results), start_s, interrupted, len(pipes) - len(results), started_unix_s)


def _tell_to_stop(pipes: Sequence[Connection]) -> None:
    for pipe in pipes:
        with suppress(OSError):
            pipe.send("stop")


def _received(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except (EOFError, OSError):  # the worker is gone
        return None


def _sum(tallies: Sequence[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total.in_flight += tally.in_flight
        total.output_tokens += tally.output_tokens
        for outcome, count in tally.outcomes.items():
            total.outcomes[outcome] = total.outcomes.get(outcome, 0) + count
    return total


def _work(pipe: Connection, share: Share, counter: Any, numbers: tuple[int, int]) -> None:
    """A worker process, from start to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # what is imported by now need not be looked at again
    pipe.send("ready")
    start_s = pipe.recv()
    pipe.send(asyncio.run(_drive(pipe, share, start_s, counter, numbers)))


async def _drive(
    pipe: Connection, share: Share, start_s: float, counter: Any, numbers: tuple[int, int]
) -> ShareResult:
    loop, stop, tally = asyncio.get_running_loop(), asyncio.Event(), Tally()

    def stop_on_word() -> None:  # the parent says stop, or is gone
        loop.remove_reader(pipe.fileno())
        stop.set()

    def next_number() -> int:
        with counter.get_lock():
            counter.value += 1
            return numbers[0] + numbers[1] * (int(counter.value) - 1)

    loop.add_reader(pipe.fileno(), stop_on_word)
    reporter = asyncio.create_task(_report(pipe, tally))
    async with open_http(share.target) as http:
        driver = Driver(share, Client(http, share.target), start_s, tally)
        result = await driver.run(stop, next_number)
    reporter.cancel()
    return result


async def _report(pipe: Connection, tally: Tally) -> None:
    for _ in itertools.count():
        await asyncio.sleep(TALLY_EVERY_S)
        with suppress(OSError):
            pipe.send(tally)
