"""Shows a run while it goes: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lowbit_core.log import get_logger
from lowbit_loadtest.generate.driver import Tally
from lowbit_loadtest.generate.records import Outcome
from lowbit_loadtest.generate.workers import OnRun, OnTally

log = get_logger("loadtest")

LINE_EVERY_S = 10.0


@contextmanager
def progress(console: Console | None = None) -> Iterator[OnRun]:
    """What `run_load_test` calls when a run begins."""
    console = console or Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            yield lambda title, requests: _bar(bar, title, requests)
    else:
        yield _lines


def describe(tally: Tally, requests: int | None) -> str:
    """`12 of 60 ended (1 rejected), 3 in flight, 480 tokens`."""
    ended = sum(tally.outcomes.values())
    others = {name: count for name, count in tally.outcomes.items() if name != Outcome.COMPLETED.value}
    trouble = ", ".join(f"{count} {name}" for name, count in others.items())
    of = f" of {requests}" if requests is not None else ""
    return (
        f"{ended}{of} ended{f' ({trouble})' if trouble else ''}, {tally.in_flight} in flight, "
        f"{tally.output_tokens} tokens"
    )


def _bar(bar: Progress, title: str, requests: int | None) -> OnTally:
    task = bar.add_task(title, total=requests, text="")

    def update(tally: Tally) -> None:
        bar.update(task, completed=sum(tally.outcomes.values()), text=describe(tally, requests))

    return update


def _lines(title: str, requests: int | None) -> OnTally:
    log.info("%s: starting", title)
    next_s = time.monotonic() + LINE_EVERY_S

    def line(tally: Tally) -> None:
        nonlocal next_s
        if time.monotonic() >= next_s:
            next_s += LINE_EVERY_S
            log.info("%s: %s", title, describe(tally, requests))

    return line
