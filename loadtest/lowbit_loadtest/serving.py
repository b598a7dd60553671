"""Runs `lowbit serve` and `lowbit quantize` as processes of their own, as a user would."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from lowbit_core.errors import LowbitError
from lowbit_core.manifest import MANIFEST_NAME

LOWBIT = (sys.executable, "-c", "import sys; from lowbit_core.cli import main; sys.exit(main())")
STOP_TIMEOUT_S = 90.0
MODEL = "checkpoint"


class ServeError(LowbitError):
    """A server did not start; the message ends with its last words."""


@dataclass(frozen=True)
class Served:
    url: str
    ready_s: float


def quantize(model: str, recipe: str, out: Path, log: Path) -> None:
    """Make a checkpoint, unless `out` holds one already."""
    if (out / MANIFEST_NAME).exists():
        return
    command = [*LOWBIT, "quantize", "--model", model, "--recipe", recipe, "--out", str(out)]
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status != 0:
        raise LowbitError(f"lowbit quantize of recipe {recipe} ended with status {status}: {last_line(log)}")


@contextmanager
def serving(directory: Path, flags: Sequence[str], log: Path, timeout_s: float) -> Iterator[Served]:
    """A server of `directory` on a free port until the block ends; ServeError if it does not become ready."""
    port = _free_port()
    command = [*LOWBIT, "serve", str(directory), "--port", str(port), "--served-model-name", MODEL, *flags]
    with log.open("w") as file:
        # a session of its own: Ctrl-C is for us, and we stop the server
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        yield Served(url, _wait_until_ready(server, url, log, timeout_s))
    finally:
        _stop(server)


def _wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path, timeout_s: float) -> float:
    start_s = time.monotonic()
    with httpx.Client(base_url=url, timeout=5.0, trust_env=False) as http:
        while (passed_s := time.monotonic() - start_s) < timeout_s:
            if server.poll() is not None:
                raise ServeError(f"lowbit serve ended with status {server.returncode}: {last_line(log)}")
            try:
                if http.get("/readyz").status_code == httpx.codes.OK:
                    return passed_s
            except (httpx.HTTPError, OSError):
                pass
            time.sleep(0.5)
    raise ServeError(f"lowbit serve was not ready within {timeout_s:g} s; its log is {log}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
    try:
        server.wait(timeout=STOP_TIMEOUT_S)
    except (
        subprocess.TimeoutExpired,
        KeyboardInterrupt,
    ):  # whoever presses Ctrl-C twice wants no orphan either
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    errors = [line for line in lines if "error" in line.lower()]
    found = errors or [line for line in lines if line.strip()] or ["it said nothing"]
    return found[-1].strip()[:300]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
