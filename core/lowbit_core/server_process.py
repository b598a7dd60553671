"""Starts a server as a process of its own, waits until it answers, says how it died, and ends it.

The process leads its own group, so Ctrl-C in a terminal reaches only its parent, and what it started can be ended with
it. Knows nothing of what is served; the standard library is enough for it.
"""

import http.client
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lowbit_core.errors import EngineError

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 90.0
POLL_EVERY_S = 0.25
MESSAGE_CHARACTERS = 300

_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class ServerProcess:
    """A server that was started. `url` is its root; `log` has what it prints; `name` is what errors call it."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    name: str

    def wait_until_ready(self, path: str = "/readyz", timeout_s: float = START_TIMEOUT_S) -> float:
        """Wait until GET `path` answers 2xx; returns the seconds. EngineError if it ends before, or takes longer."""
        start_s = time.monotonic()
        while (passed_s := time.monotonic() - start_s) < timeout_s:
            if (status := self.process.poll()) is not None:
                raise EngineError(f"{self.name} ended {describe_status(status)}: {last_words(self.log)}")
            with suppress(urllib.error.URLError, http.client.HTTPException, OSError), _get(self.url + path):
                return passed_s
            time.sleep(POLL_EVERY_S)
        raise EngineError(f"{self.name} was not ready within {timeout_s:g} s; its log is {self.log}")

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """End it by SIGTERM, after `timeout_s` by SIGKILL with all that it started; returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C shall leave no orphan either
            return self.kill()

    def kill(self) -> int:
        """End it by SIGKILL, with all that it started; returns its exit status."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


def start_server(
    command: Sequence[str],
    url: str,
    log: Path,
    *,
    name: str = "the server",
    environment: Mapping[str, str] | None = None,
) -> ServerProcess:
    """Start a command whose server will answer at `url`; whoever calls this ends it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    return ServerProcess(process, url, log, name)


@contextmanager
def running_server(
    command: Sequence[str],
    url: str,
    log: Path,
    *,
    name: str = "the server",
    environment: Mapping[str, str] | None = None,
    ready_path: str = "/readyz",
    timeout_s: float = START_TIMEOUT_S,
) -> Iterator[ServerProcess]:
    """A server that is ready, until the block ends; EngineError if it does not become so."""
    server = start_server(command, url, log, name=name, environment=environment)
    try:
        server.wait_until_ready(ready_path, timeout_s)
        yield server
    finally:
        server.stop()


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def describe_status(status: int) -> str:
    """`with status 2`, or `by SIGKILL`."""
    return f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"


def last_words(log: Path) -> str:
    """The last line of a log that mentions an error, or else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").split("\n") if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it said nothing"])[-1][:MESSAGE_CHARACTERS]


def _get(url: str) -> http.client.HTTPResponse:
    answer: http.client.HTTPResponse = _NO_PROXY.open(url, timeout=5.0)
    return answer
