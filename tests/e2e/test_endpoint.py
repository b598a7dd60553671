"""The endpoint under an operator's hands, on the real engine: keys, deadlines, leaving clients, stops and crashes."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from openai import APIStatusError, AuthenticationError, OpenAI, RateLimitError
from scripts.demo import KV_CACHE_GIB, LOWBIT, MODEL, free_port, wait_until_ready
from tests.e2e.conftest import Demo

from lowbit_server.keys import digest, new_key

pytestmark = pytest.mark.engine

LONG = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Tell me a long story."}],
    "max_tokens": 600,
    "ignore_eos": True,
}
SOON_S = 20.0  # generous: test machines are shared


@dataclass
class Endpoint:
    """A running `lowbit serve` with two keys: a user's with few requests, and an admin's."""

    process: subprocess.Popen[bytes]
    url: str
    user: str
    admin: str

    def client(self, key: str) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def running(self) -> int:
        """Requests that the engine works on."""
        page = httpx.get(f"{self.url}/metrics", headers={"authorization": f"Bearer {self.admin}"}).text
        lines = [line for line in page.splitlines() if line.startswith("vllm:num_requests_running{")]
        return sum(int(float(line.rpartition(" ")[2])) for line in lines)

    def stream(self, body: dict[str, Any]) -> list[str]:
        """The `data:` fields of one streamed answer, to its end."""
        headers = {"authorization": f"Bearer {self.admin}"}
        url = f"{self.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body | {"stream": True}, headers=headers, timeout=120) as answer:
            lines = answer.iter_lines()
            return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]

    def streams(self, count: int, body: dict[str, Any]) -> tuple[list[threading.Thread], list[list[str]]]:
        """`count` streams on as many threads, and the list that their answers go to."""
        answers: list[list[str]] = []
        threads = [
            threading.Thread(target=lambda: answers.append(self.stream(body)), daemon=True)
            for _ in range(count)
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + SOON_S
        while self.running() < count and time.monotonic() < deadline:
            time.sleep(0.1)
        assert self.running() == count
        return threads, answers


@contextmanager
def serve(checkpoint: Path, folder: Path) -> Iterator[Endpoint]:
    folder.mkdir(exist_ok=True)
    user, admin = new_key(), new_key()
    keys = [
        {"name": "user", "sha256": digest(user), "requests_per_minute": 2},
        {"name": "admin", "sha256": digest(admin), "admin": True},
    ]
    (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": keys}))
    port = free_port()
    command = [
        *LOWBIT, "serve", str(checkpoint), "--port", str(port), "--served-model-name", MODEL, "--enforce-eager",
        "--kv-cache-gib", KV_CACHE_GIB, "--api-keys", str(folder / "keys.yaml"), "--max-num-queued-reqs", "40",
    ]  # fmt: skip
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}", folder / "serve.log")
        yield Endpoint(process, f"http://127.0.0.1:{port}", user, admin)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def endpoint(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with serve(demo.checkpoint, tmp_path_factory.mktemp("endpoint")) as running:
        yield running


def until(condition: Any, seconds: float = SOON_S) -> float:
    """Seconds until a condition held."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it never came true"
        time.sleep(0.05)
    return time.monotonic() - start


def test_keys_open_the_api_up_to_their_limits(endpoint: Endpoint) -> None:
    with pytest.raises(AuthenticationError):
        endpoint.client("lb-wrong").models.list()
    client = endpoint.client(endpoint.user)
    question: Any = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    answers = [client.chat.completions.with_raw_response.create(**question) for _ in range(2)]
    assert answers[1].headers["x-ratelimit-remaining-requests"] == "0"
    with pytest.raises(RateLimitError) as refused:
        client.chat.completions.create(**question)
    assert int(refused.value.response.headers["retry-after"]) <= 30
    assert httpx.get(f"{endpoint.url}/metrics", headers={"authorization": "Bearer x"}).status_code == 401


def test_a_deadline_ends_the_work_in_the_engine(endpoint: Endpoint) -> None:
    client = endpoint.client(endpoint.admin)
    question: Any = {"model": MODEL, "messages": LONG["messages"], "max_tokens": 600}
    with pytest.raises(APIStatusError) as late:
        client.chat.completions.create(
            **question, extra_body={"ignore_eos": True}, extra_headers={"x-request-timeout": "1"}
        )
    assert late.value.status_code == 504
    until(lambda: endpoint.running() == 0, 3)
    events = endpoint.stream(LONG | {"max_tokens": 8})
    assert events[-1] == "[DONE]"


def test_a_client_that_goes_away_frees_its_place(endpoint: Endpoint) -> None:
    headers = {"authorization": f"Bearer {endpoint.admin}"}
    url = f"{endpoint.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=LONG | {"stream": True}, headers=headers, timeout=60) as answer:
        lines = answer.iter_lines()  # kept: it closes the connection when it goes
        next(lines)
        until(lambda: endpoint.running() == 1)
    assert until(lambda: endpoint.running() == 0) < 3


def test_a_full_queue_is_429_and_every_other_answer_is_whole(endpoint: Endpoint) -> None:
    statuses: list[int] = []
    waits: list[str | None] = []

    def ask() -> None:
        headers = {"authorization": f"Bearer {endpoint.admin}"}
        body = LONG | {"max_tokens": 24}
        answer = httpx.post(f"{endpoint.url}/v1/chat/completions", json=body, headers=headers, timeout=120)
        statuses.append(answer.status_code)
        waits.append(answer.headers.get("retry-after") if answer.status_code == 429 else "1")

    threads = [threading.Thread(target=ask) for _ in range(80)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 40
    assert all(wait is not None and int(wait) >= 1 for wait in waits)


def test_sigterm_under_open_streams_loses_none(endpoint: Endpoint) -> None:
    threads, answers = endpoint.streams(16, LONG | {"max_tokens": 40})
    endpoint.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    assert len(answers) == 16
    assert all(events[-1] == "[DONE]" for events in answers)
    assert endpoint.process.wait(60) == 0


def test_a_killed_engine_ends_every_stream_with_an_error_and_the_server_with_a_failure(
    demo: Demo, tmp_path: Path
) -> None:
    with serve(demo.checkpoint, tmp_path / "killed") as endpoint:
        threads, answers = endpoint.streams(4, LONG)
        children = psutil.Process(endpoint.process.pid).children(recursive=True)
        engine = max(children, key=lambda child: child.memory_info().rss)
        engine.kill()
        killed = time.monotonic()
        for thread in threads:
            thread.join(SOON_S)
        assert time.monotonic() - killed < 10
        assert len(answers) == 4
        for events in answers:
            last = json.loads([event for event in events if event != "[DONE]"][-1])
            assert "error" in last
        assert endpoint.process.wait(SOON_S) != 0
