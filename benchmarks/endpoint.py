"""`lowbit serve` for a benchmark: started on a free port, stopped with its children, described in the result."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from benchmarks.quantizers.provenance import hardware, revision

from lowbit_core.server_process import ServerProcess, free_port, running_server

ROOT = Path(__file__).resolve().parents[1]
PYTHON = Path(sys.executable)
LOWBIT = PYTHON.with_name("lowbit")


@contextmanager
def lowbit_serve(
    checkpoint: Path, log: Path, *flags: str, packages: str | None = None
) -> Iterator[ServerProcess]:
    """`lowbit serve` until the block ends, with the folder `packages` of Python packages beside its own."""
    command = [str(LOWBIT), "serve", str(checkpoint), "--enforce-eager", "--kv-cache-gib", "1", *flags]
    environment = None if packages is None else os.environ | {"PYTHONPATH": packages}
    with running(command, log, "/readyz", environment) as server:
        yield server


@contextmanager
def running(
    command: Sequence[str], log: Path, ready_path: str, environment: Mapping[str, str] | None = None
) -> Iterator[ServerProcess]:
    """Any server that takes `--port`, once `ready_path` answers 200."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with running_server(
        [*command, "--port", str(port)], url, log, ready_path=ready_path, environment=environment
    ) as server:
        yield server


@contextmanager
def pinned(servers: Iterable[ServerProcess]) -> Iterator[None]:
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
