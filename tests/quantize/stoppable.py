"""`lowbit` in a process of its own that really ends, by SIGKILL, at a named point or after a time.

The point is an audit event of the interpreter (a rename, an opened file, …), so that nothing in the program is
changed for it. A fork server has imported torch already; it runs none of it, so that forking is safe.
"""

import multiprocessing
import os
import resource
import signal
import sys
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command does, before the fork server loads torch
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lowbit_quantize.pipeline", "lowbit_quantize.cli"])


@dataclass(frozen=True)
class Point:
    """The moment before the first `event` (PEP 578) whose argument `position` is a path that contains `path`."""

    event: str
    path: str
    position: int = 0


def renaming(path: str) -> Point:
    """Just before a file that is whole takes its name."""
    return Point("os.rename", path, position=1)


def start(
    arguments: list[str], log: Path, *, kill_at: Point | None = None, file_bytes: int | None = None
) -> BaseProcess:
    """Start `lowbit`; with `file_bytes` no file may grow beyond that, as on a disk that is full."""
    process = CONTEXT.Process(target=_child, args=(arguments, log, kill_at, file_bytes))
    process.start()
    return process


def run(
    arguments: list[str], log: Path, *, kill_at: Point | None = None, file_bytes: int | None = None
) -> tuple[int | None, str]:
    """Run `lowbit` to its end; returns the exit status, −9 when it was killed, and what it wrote to stderr."""
    process = start(arguments, log, kill_at=kill_at, file_bytes=file_bytes)
    process.join()
    return process.exitcode, log.read_text()


def _child(arguments: list[str], log: Path, kill_at: Point | None, file_bytes: int | None) -> None:
    from lowbit_core.cli import main

    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
        os.dup2(file.fileno(), sys.stdout.fileno())
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
    if kill_at is not None:

        def hook(event: str, details: tuple[Any, ...]) -> None:
            if event == kill_at.event and kill_at.path in str(details[kill_at.position]):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
    sys.exit(main(arguments))
