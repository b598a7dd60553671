"""The real engine while it loads: who may wait, what is answered, and how it stops."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from scripts.demo import LOWBIT
from tests.tiny_models import write_tiny_model

from lowbit_core.server_process import ServerProcess, free_port, start_server

pytestmark = pytest.mark.engine
GONE_S = 10.0
ENGINE = "VLLM::"  # how vLLM names its processes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def loading_server(model: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    port = free_port()
    command = [*LOWBIT, "serve", str(model), "--port", str(port), "--enforce-eager", "--kv-cache-gib", "0.2"]
    started = start_server(command, f"http://127.0.0.1:{port}", tmp_path / "serve.log")
    try:
        yield started
    finally:
        started.kill()


def descendants(started: ServerProcess) -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process(started.process.pid).children(recursive=True)
    return found


def wait_for_engine(loading_server: ServerProcess) -> None:
    """Until one of vLLM's processes has its name: the engine is being started, and far from ready."""
    for _ in range(600):
        if any(one.name().startswith(ENGINE) for one in descendants(loading_server)):
            return
        time.sleep(0.2)
    raise AssertionError("no engine process")


@pytest.mark.parametrize(("number", "to_group"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_stop_while_the_engine_starts_ends_every_process(
    loading_server: ServerProcess, number: signal.Signals, to_group: bool
) -> None:
    wait_for_engine(loading_server)
    everything = descendants(loading_server)
    (os.killpg if to_group else os.kill)(loading_server.process.pid, number)
    began = time.monotonic()
    assert loading_server.process.wait(GONE_S) == 130
    _, left = psutil.wait_procs(everything, timeout=GONE_S - (time.monotonic() - began))
    assert left == []


def test_idle_and_slow_clients_delay_neither_probes_nor_readiness(loading_server: ServerProcess) -> None:
    host, port = "127.0.0.1", int(loading_server.url.rpartition(":")[2])
    wait_for_engine(loading_server)
    clients = [socket.create_connection((host, port)) for _ in range(100)]
    for client in clients[::2]:
        client.sendall(b"GET /livez HTTP/1.1\r\nX-Slow: ")
    for method, path, status in (
        ("GET", "/livez?verbose=1", 200),
        ("HEAD", "/livez", 200),
        ("HEAD", "/readyz", 503),
        ("OPTIONS", "/v1/chat/completions", 503),
    ):
        began = time.monotonic()
        assert httpx.request(method, loading_server.url + path, timeout=5).status_code == status
        assert time.monotonic() - began < 2
    loading_server.wait_until_ready()
    name = httpx.get(loading_server.url + "/v1/models").json()["data"][0]["id"]
    assert httpx.head(f"{loading_server.url}/v1/models").status_code == 200
    for client in clients:
        client.close()
    body = json.dumps({"model": name, "prompt": "a", "max_tokens": 4}).encode()
    command = [
        "curl",
        "-s",
        "--http2",
        "-H",
        "content-type: application/json",
        "-d",
        "@-",
        f"{loading_server.url}/v1/completions",
    ]
    done = subprocess.run(command, input=body, capture_output=True, check=True)
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 4
