"""An event loop whose clock is not the machine's: it jumps to the next timer when nothing is ready.

With it a test of minutes takes milliseconds, and a loaded machine cannot make it fail. Sockets do not work in it;
servers are httpx transports that sleep.
"""

import asyncio
import json
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import httpx

from lowbit_loadtest.generate.client import Client
from lowbit_loadtest.generate.driver import Driver, Share, ShareResult, Tally
from lowbit_loadtest.generate.http.target import Target, open_http
from lowbit_loadtest.generate.schedule import Job

POLL_S = 1e-4  # what one turn of the loop costs


class _Selector(selectors.SelectSelector):
    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        self.now_s += max(POLL_S, timeout or 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its `time()` starts at 0 and moves only as timers and turns of the loop move it."""

    def __init__(self) -> None:
        self._selector_of_time = _Selector()
        super().__init__(self._selector_of_time)

    def time(self) -> float:
        return self._selector_of_time.now_s


def run_virtually(main: Callable[[VirtualLoop], Coroutine[Any, Any, Any]]) -> Any:
    """The result of `main(loop)`."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main(loop))
    finally:
        loop.close()


class DelayingTransport(httpx.AsyncBaseTransport):
    """Answers request i (by its seed) `ttft_s(i, now)` after it came, then one chunk every `gap_s`."""

    def __init__(
        self, loop: VirtualLoop, ttft_s: Callable[[int, float], float], gap_s: float, chunks: int
    ) -> None:
        self._loop, self._ttft_s, self._gap_s, self._chunks = loop, ttft_s, gap_s, chunks

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        seed = json.loads(await request.aread())["seed"]
        return httpx.Response(200, stream=_Events(self._events(seed)))

    async def _events(self, seed: int) -> AsyncIterator[bytes]:
        await asyncio.sleep(self._ttft_s(seed, self._loop.time()))
        for index in range(self._chunks):
            await asyncio.sleep(self._gap_s if index else 0)
            yield _event({"choices": [{"delta": {"content": "word"}}]})
        yield _event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        usage = {"prompt_tokens": 1, "completion_tokens": self._chunks}
        yield _event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n"


class _Events(httpx.AsyncByteStream):
    def __init__(self, events: AsyncIterator[bytes]) -> None:
        self._events = events

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._events


def _event(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def drive_virtually(
    jobs: tuple[Job, ...],
    ttft_s: Callable[[int, float], float],
    gap_s: float = 0.01,
    chunks: int = 5,
    **share: Any,
) -> ShareResult:
    """Drive a share against the delaying transport in virtual time, from second 1."""

    async def main(loop: VirtualLoop) -> ShareResult:
        target = Target("http://virtual", "fake", timeout_s=600.0)
        async with open_http(target, DelayingTransport(loop, ttft_s, gap_s, chunks)) as http:
            client = Client(http, target, loop.time)
            return await Driver(Share(target, jobs, **share), client, 1.0, Tally(), loop.time).run(
                asyncio.Event()
            )

    driven: ShareResult = run_virtually(main)
    return driven
