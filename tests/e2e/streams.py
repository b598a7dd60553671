"""Streamed responses that go on while a test does something to their server."""

import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import httpx
from scripts.demo import MODEL

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
