"""A server as a process: when it counts as ready, what is told of its death, and how it ends."""

import os
import sys
import time
from pathlib import Path

import pytest

from lowbit_core.errors import EngineError
from lowbit_core.server_process import ServerProcess, free_port, last_words, running_server, start_server

SERVER = """
import http.server, os, signal, subprocess, sys, time
port, mode = int(sys.argv[1]), sys.argv[2]
if mode == "dies":
    print("loading\\nValueError: too small\\nbye", flush=True)
    sys.exit(7)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
start = time.monotonic()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        ready = time.monotonic() - start > 0.5 and mode != "never"
        self.send_response(200 if ready and self.path == "/readyz" else 503)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def start(log: Path, mode: str) -> ServerProcess:
    port = free_port()
    command = [sys.executable, "-c", SERVER, str(port), mode]
    return start_server(command, f"http://127.0.0.1:{port}", log, name="it")


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_server_is_ready_when_its_url_answers_200_and_ends_with_the_block(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-c", SERVER, str(port), "well"]
    with running_server(command, f"http://127.0.0.1:{port}", tmp_path / "log") as server:
        assert server.process.poll() is None
        assert os.getpgid(server.process.pid) == server.process.pid
    assert server.process.poll() is not None


def test_a_server_that_dies_is_an_error_with_its_status_and_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^it ended with status 7: ValueError: too small$"):
        start(tmp_path / "log", "dies").wait_until_ready()
    server = start(tmp_path / "log", "never")
    server.kill()
    with pytest.raises(EngineError, match=r"^it ended by SIGKILL: it said nothing$"):
        server.wait_until_ready()


def test_a_server_that_is_not_ready_in_time_is_an_error_with_its_log(tmp_path: Path) -> None:
    server = start(tmp_path / "log", "never")
    try:
        with pytest.raises(EngineError, match=r"^it was not ready within 1 s; its log is .*log$"):
            server.wait_until_ready(timeout_s=1)
    finally:
        assert server.stop() == -15


def test_a_server_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    server = start(tmp_path / "log", "stubborn")
    server.wait_until_ready()
    child = int((tmp_path / "log").read_text().split()[0])
    assert is_alive(child)
    assert server.stop(timeout_s=0.3) == -9
    for _ in range(100):
        if not is_alive(child):
            break
        time.sleep(0.05)
    assert not is_alive(child)


def test_the_last_error_is_told_rather_than_the_last_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("loading\nValueError: too small\n\nbye\n")
    assert last_words(log) == "ValueError: too small"
    log.write_text("loading\n\n")
    assert last_words(log) == "loading"
