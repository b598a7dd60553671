"""One streaming chat request to an OpenAI-compatible server, and the preflight that finds the model.

It knows HTTP, server-sent events and how a stream can end; it knows nothing of statistics or of other
requests. Lines are split from bytes at LF only: httpx's `aiter_lines` also splits at U+2028 and its kin,
which may stand unescaped inside the JSON of an event.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from lowbit_core.errors import ConfigError
from lowbit_loadtest.generate.records import Outcome, RequestRecord
from lowbit_loadtest.generate.request import Request

REJECTED_STATUSES = (429, 503)
FAILED_FINISH_REASONS = ("abort", "error")  # vLLM ends a request that it lost with these
PREFLIGHT_TIMEOUT_S = 10.0
DETAIL_CHARACTERS = 200
OTHER_OUTPUT = ("reasoning", "reasoning_content", "tool_calls", "refusal")
MOST_EVENT_BYTES = 4 << 20

Clock = Callable[[], float]  # seconds of one monotonic clock


@dataclass
class _Stream:
    """What has arrived of one answer so far."""

    most_chunks: int
    keep_text: bool = False
    chunk_times_s: list[float] = field(default_factory=list)
    finished_s: float | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    done: bool = False
    chunk_tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def add(self, event: dict[str, Any], now_s: float) -> None:
        carries_output = False
        for choice in event.get("choices") or []:
            delta = choice.get("delta") or {}
            if delta.get("content") or any(delta.get(key) for key in OTHER_OUTPUT):
                carries_output = True
                self.chunk_times_s.append(now_s)
            if self.keep_text and delta.get("content"):
                self.texts.append(str(delta["content"]))
            if choice.get("finish_reason"):
                self.finished_s, self.finish_reason = now_s, choice["finish_reason"]
        if usage := event.get("usage"):
            self._count(int(usage["prompt_tokens"]), int(usage["completion_tokens"]), carries_output)
            self.cached_tokens = _cached_tokens(usage)

    def _count(self, prompt_tokens: int, output_tokens: int, carries_output: bool) -> None:
        if carries_output:  # a server that counts as it goes
            self.chunk_tokens.append(output_tokens - (self.output_tokens or 0))
        self.prompt_tokens, self.output_tokens = prompt_tokens, output_tokens


def _cached_tokens(usage: dict[str, Any]) -> int | None:
    """`prompt_tokens_details.cached_tokens`, where the server says it."""
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return cached if isinstance(cached, int) else None


@dataclass(frozen=True)
class _End:
    outcome: Outcome
    detail: str = ""


class ChatClient:
    """Sends chat requests to one target. `http` is a client whose base URL ends with /v1/."""

    def __init__(self, http: httpx.AsyncClient, timeout_s: float, clock: Clock = time.monotonic) -> None:
        self._http = http
        self._timeout_s = timeout_s
        self._clock = clock

    async def find_model(self, wanted: str | None) -> str:
        """The wanted model, or the first that the server lists; ConfigError if that is not to be had."""
        target = str(self._http.base_url)
        try:
            response = await self._http.get("models", timeout=PREFLIGHT_TIMEOUT_S)
        except (httpx.HTTPError, OSError) as error:
            raise ConfigError(
                f"--target {target} does not answer ({_describe(error)}); is the server up?"
            ) from error
        if response.status_code in (401, 403):
            raise ConfigError(
                f"--target {target} refuses the API key ({response.status_code}); set LOWBIT_API_KEY"
            )
        served = _served_models(response)
        if not served:
            raise ConfigError(
                f"--target {target} lists no model at /v1/models (status {response.status_code}); "
                "give the root URL of an OpenAI-compatible server"
            )
        if wanted is not None and wanted not in served:
            raise ConfigError(
                f"--model {wanted!r} is not served at {target}; served are: {', '.join(served)}"
            )
        return wanted or served[0]

    async def complete(self, request: Request, model: str, intended_s: float | None = None) -> RequestRecord:
        """Send one request and read its stream to the end; never raises for what the server does.

        A cancelled request is recorded as cut off: whoever interrupts a run still gets every record.
        """
        stream = _Stream(4 * request.max_tokens + 64, request.keep_text)
        sent_s = self._clock()
        try:
            async with asyncio.timeout(self._timeout_s):
                end = await self._stream_answer(request.body(model), stream)
        except TimeoutError:
            chunks = f"{len(stream.chunk_times_s)} chunks for max_tokens {request.max_tokens}"
            end = _End(Outcome.TIMED_OUT, f"no end within {self._timeout_s:g} s ({chunks})")
        except asyncio.CancelledError:
            end = _End(Outcome.CUT_OFF, "interrupted by the user")
        except (httpx.HTTPError, OSError, httpx.InvalidURL) as error:
            end = _End(Outcome.FAILED, _describe(error))
        return RequestRecord(
            outcome=end.outcome,
            sent_s=sent_s,
            ended_s=self._clock(),
            chunk_times_s=tuple(stream.chunk_times_s),
            finished_s=stream.finished_s,
            finish_reason=stream.finish_reason,
            prompt_tokens=stream.prompt_tokens,
            output_tokens=stream.output_tokens,
            cached_tokens=stream.cached_tokens,
            detail=end.detail,
            intended_s=intended_s,
            index=request.index,
            turn=request.turn,
            max_tokens=request.max_tokens,
            chunk_tokens=tuple(stream.chunk_tokens),
            text="".join(stream.texts),
        )

    async def _stream_answer(self, body: dict[str, Any], stream: _Stream) -> _End:
        async with self._http.stream("POST", "chat/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                await response.aread()
                rejected = response.status_code in REJECTED_STATUSES
                detail = f"status {response.status_code}: {error_message(response.text)}"
                return _End(Outcome.REJECTED if rejected else Outcome.FAILED, detail)
            try:
                clock: Clock = response.extensions.get("arrival_clock", self._clock)
                return await _read_stream(response.aiter_raw(), stream, clock)
            except httpx.TransportError as error:
                return _ended(stream) if stream.done else _End(Outcome.CUT_OFF, _describe(error))


async def _read_stream(chunks: AsyncIterator[bytes], stream: _Stream, clock: Clock) -> _End:
    try:
        async for data in sse_data(chunks):
            now_s = clock()
            if stream.done or data == "[DONE]":
                stream.done = True  # but read on: a body left unread costs the next request a new connection
                continue
            event = json.loads(data)
            if "error" in event:
                return _End(Outcome.FAILED, f"error event: {error_message(data)}")
            stream.add(event, now_s)
            if len(stream.chunk_times_s) > stream.most_chunks:
                return _End(Outcome.FAILED, f"does not end: more than {stream.most_chunks} chunks")
    except _OversizedEvent:
        return _End(Outcome.FAILED, f"an event of more than {MOST_EVENT_BYTES >> 20} MiB")
    except (ValueError, TypeError, AttributeError, KeyError):
        return _End(Outcome.FAILED, f"not a chat completion chunk: {data[:DETAIL_CHARACTERS]}")
    return _ended(stream)


class _OversizedEvent(Exception):
    pass


def _ended(stream: _Stream) -> _End:
    if not stream.done:
        return _End(Outcome.CUT_OFF, "the stream ended without [DONE]")
    if stream.finish_reason is None:
        return _End(Outcome.CUT_OFF, "[DONE] without finish_reason")
    if stream.finish_reason in FAILED_FINISH_REASONS:
        return _End(Outcome.FAILED, f"finish_reason {stream.finish_reason}")
    return _End(Outcome.COMPLETED)


async def sse_data(chunks: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """The data of each complete server-sent event; one that the end of the stream cuts off is dropped."""
    pending = b""
    data: list[str] = []
    async for chunk in chunks:
        *lines, pending = (pending + chunk).split(b"\n")
        if len(pending) > MOST_EVENT_BYTES:
            raise _OversizedEvent
        for line in lines:
            text = line.rstrip(b"\r").decode("utf-8", errors="replace")
            if text.startswith("data:"):
                data.append(text[len("data:") :].removeprefix(" "))
            elif not text and data:
                yield "\n".join(data)
                data = []


def _served_models(response: httpx.Response) -> list[str]:
    try:
        return [str(model["id"]) for model in response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        return []


def error_message(text: str) -> str:
    """The message of an OpenAI error body, or the body itself, on one line."""
    try:
        error = json.loads(text)["error"]
        message = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError):
        message = text
    return " ".join(str(message).split())[:DETAIL_CHARACTERS]


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")
