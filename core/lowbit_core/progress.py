"""Progress for people: a bar with time left in a terminal, plain lines elsewhere. Both on stderr."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lowbit_core.log import get_logger

Item = TypeVar("Item")
LINE_EVERY_S = 10.0


def track(
    items: Iterable[Item], total: int, what: str, done: int = 0, said: Callable[[], str] | None = None
) -> Iterator[Item]:
    """Iterate while showing how far it is; `done` of the `total` were done before, `said` is told beside it."""
    console = Console(file=sys.stderr)
    if console.is_terminal:
        yield from _bar(items, total, what, done, console, said)
    else:
        yield from _lines(items, total, what, done, said)


def _bar(
    items: Iterable[Item],
    total: int,
    what: str,
    done: int,
    console: Console,
    said: Callable[[], str] | None,
) -> Iterator[Item]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total, completed=done)
        for item in items:
            yield item
            progress.update(task, advance=1, description=f"{what}, {said()}" if said else what)


def _lines(
    items: Iterable[Item], total: int, what: str, before: int, said: Callable[[], str] | None
) -> Iterator[Item]:
    log = get_logger("quantize")
    start = last = time.monotonic()
    for done, item in enumerate(items, before + 1):
        yield item
        now = time.monotonic()
        if now - last >= LINE_EVERY_S or done == total:
            left = (now - start) / (done - before) * (total - done)
            more = f", {said()}" if said else ""
            log.info("%s %d of %d, %.0f s, about %.0f s left%s", what, done, total, now - start, left, more)
            last = now
