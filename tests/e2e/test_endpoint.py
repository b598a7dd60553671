"""The endpoint under an operator's hands, on the real engine: keys, deadlines, leaving clients and crashes."""

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest
import yaml
from openai import APIStatusError, AuthenticationError, OpenAI, RateLimitError
from scripts.demo import KV_CACHE_GIB, LOWBIT, MODEL
from tests.e2e.conftest import Demo
from tests.e2e.streams import LOAD_S, LONG, SOON_S, STREAMS, Stream, open_streams, until

from lowbit_core.server_process import free_port, start_server
from lowbit_server.gateway.keys import digest, new_key

pytestmark = pytest.mark.engine


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

    def stream(self, body: dict[str, Any]) -> Stream:
        """A streamed answer that goes on while the test does."""
        return Stream(self.url, self.admin, body)

    def open_streams(self, count: int, max_tokens: int) -> list[Stream]:
        """Streams that have all begun and of which none has ended."""
        return open_streams(lambda: self.stream(LONG | {"max_tokens": max_tokens}), count)


@pytest.fixture(scope="module")
def endpoint(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("endpoint")
    user, admin = new_key(), new_key()
    keys = [
        {"name": "user", "sha256": digest(user), "requests_per_minute": 2},
        {"name": "admin", "sha256": digest(admin), "admin": True},
    ]
    (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": keys}))
    port = free_port()
    command = [
        *LOWBIT, "serve", str(demo.checkpoint), "--port", str(port), "--served-model-name", MODEL, "--enforce-eager",
        "--kv-cache-gib", KV_CACHE_GIB, "--api-keys", str(folder / "keys.yaml"), "--max-num-queued-reqs", str(STREAMS),
    ]  # fmt: skip
    server = start_server(command, f"http://127.0.0.1:{port}", folder / "serve.log", name="lowbit serve")
    try:
        server.wait_until_ready()
        yield Endpoint(server.process, server.url, user, admin)
    finally:
        server.kill()


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
    assert endpoint.stream(LONG | {"max_tokens": 8}).join()[-1] == "[DONE]"


def test_a_client_that_goes_away_frees_its_place(endpoint: Endpoint) -> None:
    headers = {"authorization": f"Bearer {endpoint.admin}"}
    url = f"{endpoint.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=LONG | {"stream": True}, headers=headers, timeout=60) as answer:
        lines = answer.iter_lines()  # kept: it closes the connection when it goes
        next(lines)
        until(lambda: endpoint.running() == 1)
    assert until(lambda: endpoint.running() == 0) < 3


def test_a_full_queue_is_429_and_every_other_answer_is_whole(endpoint: Endpoint) -> None:
    streams = endpoint.open_streams(STREAMS, 300)  # as many as the queue has places, for long enough
    headers = {"authorization": f"Bearer {endpoint.admin}"}
    with httpx.Client(headers=headers, timeout=LOAD_S) as client:
        for _ in range(8):
            refused = client.post(f"{endpoint.url}/v1/chat/completions", json=LONG)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
    assert all(stream.ended_at is None for stream in streams)
    for stream in streams[4:]:  # the rest sooner
        stream.left = True
    assert all(stream.join()[-1] == "[DONE]" for stream in streams[:4])
    until(lambda: endpoint.running() == 0)


def test_a_killed_engine_ends_every_stream_with_an_error_and_the_server_with_a_failure(
    endpoint: Endpoint,
) -> None:
    """The last test here: it ends the server."""
    streams = endpoint.open_streams(STREAMS, 600)
    children = psutil.Process(endpoint.process.pid).children(recursive=True)
    engine = max(children, key=lambda child: child.memory_info().rss)
    engine.kill()
    killed = time.monotonic()
    for stream in streams:
        last = json.loads(stream.join()[-1])
        assert set(last["error"]) == {"message", "type", "param", "code"}
        assert stream.failure is None
        assert stream.ended_at is not None
        assert stream.ended_at - killed < 5
    assert endpoint.process.wait(SOON_S) != 0
