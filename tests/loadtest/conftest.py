"""A fake OpenAI-compatible server: plain ASGI on a loopback port, scripted answers, no model behind them."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import uvicorn
from tests.loadtest.fake_openai import Reply as TimedReply
from tests.loadtest.fake_openai import settings_of

from lowbit_loadtest.generate.client import Client
from lowbit_loadtest.generate.driver import Driver, Share, ShareResult, Tally
from lowbit_loadtest.generate.http.target import Target, open_http
from lowbit_loadtest.generate.request import Message
from lowbit_loadtest.generate.schedule import Job, Turn

ASGIMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[ASGIMessage]]
Send = Callable[[ASGIMessage], Awaitable[None]]


@dataclass(frozen=True)
class Reply:
    """How one chat request is answered."""

    status: int = 200
    chunks: int = 4
    tokens_per_chunk: int = 1
    content: str = "word "
    first_chunk_delay_s: float = 0.0
    finish_reason: str | None = "stop"
    usage: bool = True
    done: bool = True
    raw_event: str | None = None  # sent after the first chunk, as it is
    drops_connection: bool = False
    hangs: bool = False


@dataclass
class FakeServer:
    """Answers from `replies` in order, then with `Reply()`; notes what it was sent."""

    url: str = ""
    models: tuple[str, ...] = ("fake-model", "fake-adapter")
    unlisted: tuple[str, ...] = ()  # it answers them too
    api_key: str | None = None
    replies: deque[Reply] = field(default_factory=deque)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    connections: set[tuple[str, int]] = field(default_factory=set)
    output_tokens: int = 0
    in_flight: int = 0
    most_in_flight: int = 0

    def script(self, **reply: Any) -> None:
        """Answer the next unscripted request so."""
        self.replies.append(Reply(**reply))

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        keys = [value.decode() for name, value in scope["headers"] if name == b"authorization"]
        if self.api_key is not None and keys != [f"Bearer {self.api_key}"]:
            await _send_json(send, 401, {"error": {"message": "wrong key"}})
        elif scope["path"] == "/v1/models":
            await _send_json(send, 200, {"data": [{"id": name} for name in self.models]})
        elif scope["path"] == "/v1/chat/completions":
            self.connections.add(tuple(scope["client"]))
            await self._chat(receive, send)
        else:
            await _send_json(send, 404, {"detail": "Not Found"})

    async def _chat(self, receive: Receive, send: Send) -> None:
        self.bodies.append(json.loads((await receive())["body"]))
        model = self.bodies[-1].get("model")
        if model not in (*self.models, *self.unlisted):
            await _send_json(send, 404, {"error": {"message": f"no model {model}", "code": 404}})
            return
        reply = self.replies.popleft() if self.replies else Reply()
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if reply.status != 200:
                await _send_json(send, reply.status, {"error": {"message": "no room", "code": reply.status}})
            else:
                await self._stream(reply, receive, send)
        finally:
            self.in_flight -= 1

    async def _stream(self, reply: Reply, receive: Receive, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"text/event-stream")],
            }
        )
        await _send_event(send, _chunk({"role": "assistant", "content": ""}))
        await asyncio.sleep(reply.first_chunk_delay_s)
        for index in range(reply.chunks):
            await _send_event(send, _chunk({"content": reply.content}))
            if index == 0 and reply.raw_event is not None:
                await _send_event(send, reply.raw_event)
            if reply.drops_connection:
                raise ConnectionAbortedError("scripted")
            if reply.hangs:
                await receive()  # the client's disconnect
                return
        if reply.finish_reason is not None:
            await _send_event(send, _chunk({}, reply.finish_reason))
        tokens = reply.chunks * reply.tokens_per_chunk
        self.output_tokens += tokens
        if reply.usage:
            usage = {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}
            await _send_event(send, json.dumps({"choices": [], "usage": usage}))
        if reply.done:
            await _send_event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    """A running fake server on a free loopback port."""
    yield from serve_fake(FakeServer())


Served = TypeVar("Served", bound=FakeServer)


def serve_fake(fake: Served) -> Iterator[Served]:
    """Run a fake in a thread until the generator goes on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(fake, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield fake
        server.should_exit = True
        thread.join()


def _chunk(delta: dict[str, Any], finish_reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return json.dumps({"object": "chat.completion.chunk", "choices": [choice]}, ensure_ascii=False)


async def _send_event(send: Send, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


async def _send_json(send: Send, status: int, body: object) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


HELLO: tuple[Message, ...] = ({"role": "user", "content": "Hello"},)


def jobs(count: int, prompts: tuple[tuple[Message, ...], ...] = (HELLO,), **changes: Any) -> tuple[Job, ...]:
    """`count` single requests; `at_s` (one a job), `max_tokens` and `seed` may be given."""
    at_s = changes.get("at_s", [None] * count)
    turns = [(Turn(prompts[index % len(prompts)], changes.get("max_tokens", 128)),) for index in range(count)]
    return tuple(
        Job(index, at_s[index], turns[index], changes.get("seed", 0) + index) for index in range(count)
    )


def drive(url: str, share_jobs: tuple[Job, ...], **settings: Any) -> ShareResult:
    """Drive a share in this process: what a worker does, without its process."""
    timeout_s, api_key = settings.pop("timeout_s", 30.0), settings.pop("api_key", None)
    transport: httpx.AsyncBaseTransport | None = settings.pop("transport", None)
    target = Target(url, settings.pop("model", "fake-model"), api_key, timeout_s)

    async def run() -> ShareResult:
        async with open_http(target, transport) as http:
            share = Share(target, share_jobs, **settings)
            driver = Driver(share, Client(http, target), time.monotonic() + 0.01, Tally())
            return await driver.run(asyncio.Event())

    return asyncio.run(run())


@pytest.fixture
def timed_server() -> Iterator[Callable[..., str]]:
    """Starts the timed stand-in in its own process; returns its URL."""
    processes = []

    def start(*schedule: TimedReply, **settings: Any) -> str:
        file = Path(__file__).with_name("fake_openai.py")
        command = [sys.executable, "-S", str(file), settings_of(list(schedule), **settings)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        return f"http://127.0.0.1:{process.stdout.readline().strip()}"

    yield start
    for process in processes:
        process.kill()
        process.communicate()
