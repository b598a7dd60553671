"""`lowbit serve` for a benchmark: started on a free port, stopped with its children, described in the result."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from benchmarks.quantizers.provenance import hardware, revision

ROOT = Path(__file__).resolve().parents[1]
PYTHON = Path(sys.executable)
LOWBIT = PYTHON.with_name("lowbit")
START_S = 300.0


@dataclass(frozen=True)
class Running:
    """A server that answers, and its log."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def lowbit_serve(checkpoint: Path, log: Path, *flags: str) -> Iterator[Running]:
    """`lowbit serve` until the block ends."""
    command = [str(LOWBIT), "serve", str(checkpoint), "--enforce-eager", "--kv-cache-gib", "1", *flags]
    with running(command, log, "/readyz") as server:
        yield server


@contextmanager
def running(command: Sequence[str], log: Path, ready_path: str) -> Iterator[Running]:
    """Any server that takes `--port`, once `ready_path` answers 200."""
    port = free_port()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = Running(process, f"http://127.0.0.1:{port}", log)
    try:
        _wait(server, ready_path)
        yield server
    finally:
        _stop(process)


def _wait(server: Running, path: str) -> None:
    began = time.monotonic()
    while time.monotonic() - began < START_S:
        if server.process.poll() is not None:
            raise SystemExit(f"the server ended with {server.process.returncode}; see {server.log}")
        try:
            with urllib.request.urlopen(server.url + path, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise SystemExit(f"the server was not ready after {START_S:.0f} s; see {server.log}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def pinned(servers: Iterable[Running]) -> Iterator[None]:
    """Keep the threads of this process and of the servers, but for their workers, off the first core.

    vLLM's engine spins while its worker computes; where the kernel puts it decides how fast a small machine is.
    """
    own = os.sched_getaffinity(0)
    others = own - {min(own)}
    if others:
        for server in servers:
            parent = psutil.Process(server.process.pid)
            for process in (parent, *parent.children(recursive=True)):
                if not process.name().startswith("VLLM::Worker"):
                    for thread in process.threads():
                        os.sched_setaffinity(thread.id, others)
        os.sched_setaffinity(0, others)
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


def write_result(path: Path, result: dict[str, Any]) -> None:
    """The result with where and when it was measured."""
    where = {
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "revision": revision(ROOT),
        "hardware": hardware(),
        "load_average": round(os.getloadavg()[0], 2),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(where | result, indent=1) + "\n", encoding="utf-8")
