"""The endpoint under an operator's hands, on the real engine: keys, deadlines, leaving clients, stops and crashes."""

import json
import os
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from openai import APIStatusError, AuthenticationError, OpenAI, RateLimitError
from scripts.demo import KV_CACHE_GIB, LOWBIT, MODEL
from tests.e2e.conftest import Demo

from lowbit_core.server_process import ServerProcess, free_port
from lowbit_server.gateway.keys import digest, new_key

pytestmark = pytest.mark.engine

LONG = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Tell me a long story."}],
    "max_tokens": 600,
    "ignore_eos": True,
}
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
SOON_S = 20.0  # generous: test machines are shared
LOAD_S = 180.0  # what all streams together may take on a slow machine
STREAMS = 32


class Stream:
    """One streamed answer, read on a thread of its own; its events are there as soon as they arrive."""

    def __init__(self, url: str, key: str, body: dict[str, Any]) -> None:
        self._url, self._key, self._body = f"{url}/v1/chat/completions", key, body | STREAMED
        self.events: list[str] = []
        self.failure: str | None = None  # of the transport
        self.started_at = time.monotonic()
        self.answered_at: float | None = None  # its status has arrived
        self.begun_at: float | None = None  # more than the opening event, which has no text yet
        self.ended_at: float | None = None
        self.left = False  # set by the reader to go away at the next event
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        headers = {"authorization": f"Bearer {self._key}"}
        try:
            with httpx.stream("POST", self._url, json=self._body, headers=headers, timeout=LOAD_S) as answer:
                self.answered_at = time.monotonic()
                for line in answer.iter_lines():
                    if self.left:
                        break
                    if line.startswith("data: "):
                        self.events.append(line.removeprefix("data: "))
                    if self.begun_at is None and len(self.events) > 1:
                        self.begun_at = time.monotonic()
        except httpx.HTTPError as error:
            self.failure = repr(error)
        self.ended_at = time.monotonic()

    @property
    def is_open(self) -> bool:
        return self.begun_at is not None and self.ended_at is None

    def story(self) -> str:
        """When it was answered, begun and ended, in seconds from its start."""
        times = {"answered": self.answered_at, "begun": self.begun_at, "ended": self.ended_at}
        told = (f"{word} {at - self.started_at:.1f}" for word, at in times.items() if at is not None)
        return f"{', '.join(told)} s; {len(self.events)} events, {self.failure or 'no failure'}"

    def join(self, seconds: float = LOAD_S) -> list[str]:
        """All events, once the stream has ended."""
        self._thread.join(seconds)
        assert self.ended_at is not None, f"the stream is still open after {seconds} s"
        return self.events


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
        "--kv-cache-gib", KV_CACHE_GIB, "--api-keys", str(folder / "keys.yaml"), "--max-num-queued-reqs", str(STREAMS),
        "--drain-timeout-s", str(int(LOAD_S)),
    ]  # fmt: skip
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        ServerProcess(
            process, f"http://127.0.0.1:{port}", folder / "serve.log", "lowbit serve"
        ).wait_until_ready()
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


def open_streams(start: Callable[[], Stream], count: int) -> list[Stream]:
    """`count` streams that are open at the same time. One that ends before the last has begun is replaced.

    On some machines one of four has begun after the others had ended, rarely; the warning says when each did.
    """
    streams: list[Stream] = []
    while missing := count - sum(stream.is_open for stream in streams):
        assert len(streams) < 3 * count, [stream.story() for stream in streams]
        streams += [start() for _ in range(missing)]
        for stream in streams:
            until(lambda stream=stream: stream.begun_at or stream.ended_at, LOAD_S)
    ended = [stream for stream in streams if not stream.is_open]
    assert all(stream.events[-1:] == ["[DONE]"] for stream in ended), [stream.story() for stream in ended]
    if ended:
        warnings.warn(f"some began late: {[stream.story() for stream in streams]}", stacklevel=2)
    return [stream for stream in streams if stream.is_open]


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
    streams = endpoint.open_streams(STREAMS, 600)  # as many as the queue has places, for long enough
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


def test_sigterm_under_open_streams_loses_none(endpoint: Endpoint) -> None:
    tokens = 300
    streams = endpoint.open_streams(STREAMS, tokens)
    endpoint.process.send_signal(signal.SIGTERM)
    assert all(stream.ended_at is None for stream in streams)
    for stream in streams:
        *answer, usage, done = stream.join()
        assert (stream.failure, done) == (None, "[DONE]")
        assert json.loads(answer[-1])["choices"][0]["finish_reason"] == "length"
        assert json.loads(usage)["usage"]["completion_tokens"] == tokens
    assert endpoint.process.wait(60) == 0


def test_a_killed_engine_ends_every_stream_with_an_error_and_the_server_with_a_failure(
    demo: Demo, tmp_path: Path
) -> None:
    with serve(demo.checkpoint, tmp_path / "killed") as endpoint:
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
