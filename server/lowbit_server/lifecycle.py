"""How a server process starts and stops: its signals, its children, and whether what it serves is alive.

An engine's constructor blocks for a minute or more and may swallow an exception that a signal raises in it. So it runs
in a thread, the event loop stays free for signals and probes, and a stop before the end of loading does not wait for
it: every child is ended, then the process ends.
"""

import _posixsubprocess
import asyncio
import contextlib
import ctypes
import errno
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from multiprocessing import resource_tracker
from typing import Any, Protocol, TypeVar

import psutil

from lowbit_core.log import get_logger

SIGNALS = (signal.SIGTERM, signal.SIGINT)
INTERRUPTED = 130  # exit status, as a shell's for Ctrl-C
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
CHILDREN_S = 4.0  # for the kernel to end processes after SIGKILL
UNWIND_S = 3.0  # for what was opened while loading to close, once the children are gone

T = TypeVar("T")
log = get_logger("serve")


class Liveness(Protocol):
    """Something that can die while the process serves: an engine, or this node's workers."""

    @property
    def dead(self) -> bool: ...


class StoppedWhileLoadingError(Exception):
    """A signal came before the engine was ready; its processes are gone, its constructor may still run."""


class DrainState:
    """Whether a stop has been asked for, and whether a second time, which ends the drain."""

    def __init__(self) -> None:
        self.requested, self.hurried = asyncio.Event(), asyncio.Event()

    @property
    def draining(self) -> bool:
        return self.requested.is_set()

    def listen_to_signals(self) -> None:
        """From now on a signal asks the running event loop to stop."""
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._ask)

    def _ask(self) -> None:
        if self.draining:
            self.hurried.set()
        self.requested.set()


@contextlib.contextmanager
def leaving_at_once_on_signals() -> Iterator[None]:
    """Until there is something to clean up: an exception might be swallowed by the import that it is raised in."""

    def leave(_number: int, _frame: object) -> None:
        os.write(2, b"lowbit: interrupted\n")
        os._exit(INTERRUPTED)

    previous = {number: signal.signal(number, leave) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


async def in_thread(work: Callable[[], T]) -> T:
    """Run blocking work in a thread that nobody waits for at the process's end, unlike those of asyncio.to_thread."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            tell(_fail, done, error)
        else:
            tell(_fulfil, done, result)

    def tell(*call: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(*call)

    threading.Thread(target=run, name="loading", daemon=True).start()
    return await done


def _fulfil(done: asyncio.Future[T], result: T) -> None:
    if not done.done():
        done.set_result(result)


def _fail(done: asyncio.Future[Any], error: BaseException) -> None:
    if not done.done():
        done.set_exception(error)


async def unless_stopped(loading: Coroutine[Any, Any, T], stop: asyncio.Event) -> T:
    """The result of `loading`; StoppedWhileLoadingError, with every child process ended, where `stop` is set first."""
    adopt_orphans()
    task, asked = asyncio.ensure_future(loading), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            return task.result()
        log.info("stopping while loading: ending the engine's processes")
        start_nothing_more()
        end_children()
        watchdog = threading.Timer(UNWIND_S, os._exit, (INTERRUPTED,))
        watchdog.daemon = True
        watchdog.start()
        raise StoppedWhileLoadingError
    finally:
        task.cancel()
        asked.cancel()
        await asyncio.gather(task, asked, return_exceptions=True)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies, so that `end_children` finds them (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def start_nothing_more() -> None:
    """From now on every attempt of this process to start another one fails: a thread that loads cannot be stopped."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ECANCELED, "the server is stopping")

    places: tuple[tuple[Any, str], ...] = (
        *((os, name) for name in ("fork", "forkpty", "posix_spawn", "posix_spawnp")),
        (subprocess, "_fork_exec"),
        (_posixsubprocess, "fork_exec"),  # multiprocessing's way
    )
    for module, name in places:
        setattr(module, name, refuse)


def end_children(within_s: float = CHILDREN_S) -> None:
    """End every descendant by SIGKILL, those too that are started meanwhile, and wait until they are gone.

    Python's resource tracker stays: it ends with this process and then frees what the killed left in shared memory.
    """
    deadline = time.monotonic() + within_s
    while (children := _children()) and time.monotonic() < deadline:
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, timeout=max(0.0, deadline - time.monotonic()))


def _children() -> list[psutil.Process]:
    tracker = getattr(resource_tracker._resource_tracker, "_pid", None)
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if child.pid != tracker and _status(child) != psutil.STATUS_ZOMBIE
    ]


def _status(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return str(psutil.STATUS_ZOMBIE)
