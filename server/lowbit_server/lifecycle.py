"""How a server process starts and stops: its signals, whether it drains, and whether what it serves is alive."""

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from typing import Protocol

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Liveness(Protocol):
    """Something that can die while the process serves: an engine, or this node's workers."""

    @property
    def dead(self) -> bool: ...


@contextlib.contextmanager
def interruptible_start() -> Iterator[None]:
    """Turn SIGTERM and SIGINT into KeyboardInterrupt: loading a model blocks the event loop for a minute.

    An interrupt that arrives where Python cannot raise it (in a finalizer or a callback from C) is raised
    when the block ends, so that no signal is lost.
    """
    asked = False

    def interrupt(_number: int, _frame: object) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if asked:
        raise KeyboardInterrupt


class DrainState:
    """Whether a stop has been asked for."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()

    @property
    def draining(self) -> bool:
        return self.requested.is_set()
