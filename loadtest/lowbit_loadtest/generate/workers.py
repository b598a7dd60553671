"""Worker processes: each runs its share in its own interpreter, because one event loop inflates what it measures.

Processes are spawned, not forked. They get their share over a pipe, say when they are ready, start together at one
moment of the machine's monotonic clock, report counts four times a second and everything at the end. They ignore
Ctrl-C; the parent tells them to stop.
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
from lowbit_loadtest.generate.client import ChatClient
from lowbit_loadtest.generate.driver import Driven, Driver, Share, Tally, open_http
from lowbit_loadtest.generate.schedule import Plan

TALLY_EVERY_S = 0.25
START_TIMEOUT_S = 120.0
STARTS_IN_S = 0.1
STOP_TIMEOUT_S = 15.0

OnTally = Callable[[Tally], None]
OnRun = Callable[[str, int | None], OnTally]  # a run begins: its title, and how many requests it has


@dataclass(frozen=True)
class Ran:
    """What all workers did together. `lost` are requests of workers that died, whose end is unknown."""

    driven: tuple[Driven, ...]
    start_s: float
    interrupted: bool = False
    lost_workers: int = 0


def shares_of(plan: Plan, share: Share, workers: int) -> list[Share]:
    """The plan dealt over workers: jobs in turn in an open loop, streams in a closed one (jobs are shared)."""
    if plan.concurrency is None:
        parts = [plan.jobs[worker::workers] for worker in range(workers)]
        return [replace(share, jobs=jobs) for jobs in parts if jobs]
    streams = [len(range(worker, plan.concurrency, workers)) for worker in range(workers)]
    return [replace(share, jobs=plan.jobs, streams=count) for count in streams if count]


def default_workers(cpus: int | None = None) -> int:
    """Half of the CPUs this process may use, at least one and at most eight."""
    allowed = cpus or (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, min(8, allowed // 2))


def run_workers(shares: Sequence[Share], on_tally: OnTally, until: Event | None = None) -> Ran:
    """Run every share in its own process, to the end, until Ctrl-C, or until the event `until` is set; the records so
    far come back in any case."""
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    pairs = [context.Pipe() for _ in shares]
    processes = [
        context.Process(target=_work, args=(theirs, share, counter), daemon=True)
        for (_, theirs), share in zip(pairs, shares, strict=True)
    ]
    for process, (_, theirs) in zip(processes, pairs, strict=True):
        process.start()
        theirs.close()
    ours = [mine for mine, _ in pairs]
    try:
        start_s = _start_together(ours)
        return _collect(ours, start_s, on_tally, until or Event())
    finally:
        for process in processes:
            process.join(timeout=1.0)
            if process.is_alive():
                process.kill()
                process.join()


def _start_together(pipes: Sequence[Connection]) -> float:
    for pipe in pipes:
        if not pipe.poll(START_TIMEOUT_S):
            raise LowbitError(f"a worker process did not start within {START_TIMEOUT_S:g} s")
        try:
            pipe.recv()
        except EOFError:
            raise LowbitError("a worker process died while it started") from None
    start_s = time.monotonic() + STARTS_IN_S
    for pipe in pipes:
        pipe.send(start_s)
    return start_s


def _collect(pipes: Sequence[Connection], start_s: float, on_tally: OnTally, until: Event) -> Ran:
    """Read the pipes until each worker has sent its `Driven` or is gone."""
    tallies: dict[Connection, Tally] = {}
    driven: list[Driven] = []
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
                if isinstance(message, Driven):
                    driven.append(message)
                open_pipes.remove(pipe)
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted, told, give_up_s = True, True, time.monotonic() + STOP_TIMEOUT_S
            _tell_to_stop(open_pipes)
    return Ran(tuple(driven), start_s, interrupted, len(pipes) - len(driven))


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


def _work(pipe: Connection, share: Share, counter: Any) -> None:
    """A worker process, from start to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # what is imported by now need not be looked at again
    pipe.send("ready")
    start_s = pipe.recv()
    pipe.send(asyncio.run(_drive(pipe, share, start_s, counter)))


async def _drive(pipe: Connection, share: Share, start_s: float, counter: Any) -> Driven:
    loop, stop, tally = asyncio.get_running_loop(), asyncio.Event(), Tally()

    def heard() -> None:  # the parent says stop, or is gone
        loop.remove_reader(pipe.fileno())
        stop.set()

    def next_number() -> int:
        with counter.get_lock():
            counter.value += 1
            return int(counter.value) - 1

    loop.add_reader(pipe.fileno(), heard)
    reporter = asyncio.create_task(_report(pipe, tally))
    async with open_http(share.target) as http:
        driver = Driver(share, ChatClient(http, share.target.timeout_s), start_s, tally)
        driven = await driver.run(stop, next_number)
    reporter.cancel()
    return driven


async def _report(pipe: Connection, tally: Tally) -> None:
    for _ in itertools.count():
        await asyncio.sleep(TALLY_EVERY_S)
        with suppress(OSError):
            pipe.send(tally)
