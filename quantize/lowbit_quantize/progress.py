"""Progress for people: a bar with time left in a terminal, plain lines elsewhere. Both on stderr."""

import sys
import time
from collections.abc import Iterable, Iterator
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


def track(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Iterate while showing how far it is."""
    console = Console(file=sys.stderr)
    yield from _bar(items, total, what, console) if console.is_terminal else _lines(items, total, what)


def _bar(items: Iterable[Item], total: int, what: str, console: Console) -> Iterator[Item]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield from progress.track(items, total=total, description=what)


def _lines(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    log = get_logger("quantize")
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= LINE_EVERY_S or done == total:
            left = (now - start) / done * (total - done)
            log.info("%s %d of %d, %.0f s, about %.0f s left", what, done, total, now - start, left)
            last = now
