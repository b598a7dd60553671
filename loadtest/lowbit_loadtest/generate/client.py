"""One request to a server, and how its answer ended.

It knows HTTP and how a stream can end; what an event says is read by the target's endpoint. It knows nothing of
statistics or of other requests. A stream is whole when it has told why it ended and sent its last mark; a body that is
JSON is a whole answer of a server that does not stream.
"""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from lowbit_loadtest.generate.answer import Answer
from lowbit_loadtest.generate.endpoints import endpoint_named
from lowbit_loadtest.generate.endpoints.piece import error_message, error_of, one_line
from lowbit_loadtest.generate.http.events import MOST_EVENT_BYTES, Event, EventReader, OversizedEvent
from lowbit_loadtest.generate.http.target import Target
from lowbit_loadtest.generate.records import Outcome, RequestRecord
from lowbit_loadtest.generate.request import Request

REJECTED_STATUSES = (429, 503, 529)  # 529: Anthropic's overloaded
FAILED_FINISH_REASONS = ("abort", "error", "failed", "cancelled", "insufficient_system_resource")
READABLE = ("", "identity", "gzip", "deflate")  # content codings; a proxy may add one that nobody asked for
LENIENT = "counted as completed without {} (--lenient)"

Clock = Callable[[], float]  # seconds of one monotonic clock
NOT_OF_THIS_API = (ValueError, TypeError, AttributeError, KeyError)


@dataclass(frozen=True)
class _End:
    outcome: Outcome
    detail: str = ""
    note: str = ""


class Client:
    """Sends requests to one target. `http` is a client whose base URL is the target's."""

    def __init__(self, http: httpx.AsyncClient, target: Target, clock: Clock = time.monotonic) -> None:
        self._http = http
        self._target = target
        self._endpoint = endpoint_named(target.endpoint)
        self._clock = clock

    async def complete(self, request: Request, intended_s: float | None = None) -> RequestRecord:
        """Send one request and read its answer to the end; never raises for what the server does.

        A cancelled request is recorded as cut off: whoever interrupts a run still gets every record.
        """
        target = self._target
        body = target.access.changed(self._endpoint.body(request, target.model))
        if not body.get("stream"):
            body.pop("stream_options", None)  # servers refuse it then
        limit = self._limit(body)
        answer = Answer(None if limit is None else 4 * limit + 64, request.keep_text)
        sent_s = self._clock()
        try:
            async with asyncio.timeout(target.timeout_s):
                end = await self._ask(body, answer)
        except TimeoutError:
            chunks = f"{len(answer.chunk_times_s)} chunks for max_tokens {limit}"
            end = _End(Outcome.TIMED_OUT, f"no end within {target.timeout_s:g} s ({chunks})")
        except asyncio.CancelledError:
            end = _End(Outcome.CUT_OFF, "interrupted by the user")
        except (httpx.HTTPError, OSError, httpx.InvalidURL) as error:
            end = _End(Outcome.FAILED, describe(error))
        return self._record(request, answer, end, limit, sent_s, intended_s)

    def _limit(self, body: dict[str, Any]) -> int | None:
        """The most output tokens that the body asks for, of all its choices."""
        limits = (body[key] for key in self._endpoint.limit_keys if isinstance(body.get(key), int))
        limit = next(limits, None)
        choices = body.get("n") if isinstance(body.get("n"), int) else None
        return None if limit is None else limit * (choices or 1)

    def _record(
        self,
        request: Request,
        answer: Answer,
        end: _End,
        limit: int | None,
        sent_s: float,
        intended_s: float | None,
    ) -> RequestRecord:
        completed = end.outcome is Outcome.COMPLETED
        return RequestRecord(
            outcome=end.outcome,
            sent_s=sent_s,
            ended_s=self._clock(),
            chunk_times_s=tuple(answer.chunk_times_s),
            first_answer_s=answer.first_answer_s,
            finished_s=answer.finished_s,
            finish_reason=answer.finish_reason,
            prompt_tokens=answer.prompt_tokens,
            output_tokens=answer.output_tokens,
            visible_tokens=answer.visible_tokens,
            reasoning_tokens=answer.reasoning_tokens,
            cached_tokens=answer.cached_tokens,
            detail=end.detail,
            notes=(*filter(None, [end.note]), *(answer.notes() if completed else [])),
            intended_s=intended_s,
            index=request.index,
            turn=request.turn,
            max_tokens=limit,
            chunk_tokens=tuple(answer.chunk_tokens),
            text="".join(answer.texts),
        )

    async def _ask(self, body: dict[str, Any], answer: Answer) -> _End:
        async with self._http.stream("POST", self._endpoint.path, content=_encoded(body)) as response:
            if not response.is_success:
                return await self._refused(response)
            try:
                return await self._read(response, answer)
            except httpx.TransportError as error:
                return self._ended(answer) if answer.done else _End(Outcome.CUT_OFF, describe(error))

    async def _refused(self, response: httpx.Response) -> _End:
        await response.aread()
        status = response.status_code
        if response.is_redirect:
            return _End(Outcome.FAILED, redirect_text(response))
        detail = f"status {status}: {error_message(response.text)}"
        return _End(Outcome.REJECTED if status in REJECTED_STATUSES else Outcome.FAILED, detail)

    async def _read(self, response: httpx.Response, answer: Answer) -> _End:
        clock: Clock = response.extensions.get("arrival_clock", self._clock)
        coding = response.headers.get("content-encoding", "").lower()
        if coding not in READABLE:
            return _End(Outcome.FAILED, f"content-encoding {coding!r} was not asked for and cannot be read")
        plain = coding in ("", "identity")
        reader = EventReader()
        try:
            async for chunk in response.aiter_raw() if plain else response.aiter_bytes():
                for event in reader.feed(chunk):
                    if (end := self._take(event, answer, clock())) is not None:
                        return end
        except OversizedEvent:
            return _End(Outcome.FAILED, f"an event of more than {MOST_EVENT_BYTES >> 20} MiB")
        for event in reader.end():
            if (end := self._take(event, answer, clock())) is not None:
                return end
        if reader.whole is not None:
            return self._read_whole(bytes(reader.whole), answer)
        if not answer.events and not answer.done:
            return _no_events(reader.head)
        return self._ended(answer)

    def _take(self, event: Event, answer: Answer, now_s: float) -> _End | None:
        """Take an event; the end, if it is one that nothing can follow."""
        if answer.done:
            return None  # but read on: a body left unread costs the next request a new connection
        if event.name == "error":
            return _End(Outcome.FAILED, f"error event: {error_message(event.text)}")
        if event.value is None:
            answer.done = event.is_done
            return None if answer.done else self._not_of_this_api(event.text)
        if (error := error_of(event.value)) is not None:
            return _End(Outcome.FAILED, f"error event: {error}")
        try:
            piece = self._endpoint.read(event.value)
            answer.add(piece, now_s)
        except NOT_OF_THIS_API:
            return self._not_of_this_api(event.text)
        if piece.says_nothing and "choices" not in event.value:
            answer.unread = event.text  # perhaps the reason, in words of the server's own
        if piece.error is not None:
            return _End(Outcome.FAILED, f"error event: {piece.error}")
        if answer.most_chunks is not None and len(answer.chunk_times_s) > answer.most_chunks:
            return _End(Outcome.FAILED, f"does not end: more than {answer.most_chunks} chunks")
        return None

    def _read_whole(self, body: bytes, answer: Answer) -> _End:
        """A body that is JSON: an error with status 200, or the answer of a server that does not stream."""
        answer.streamed = not self._endpoint.streams
        text = body.decode("utf-8", errors="replace")
        try:
            value = json.loads(text)
            if (error := error_of(value)) is not None:
                return _End(Outcome.FAILED, f"status 200 with an error: {error}")
            piece = self._endpoint.read(value)
            answer.add(piece, None)
        except (*NOT_OF_THIS_API, RecursionError):
            return self._not_of_this_api(text)
        if piece.error is not None:
            return _End(Outcome.FAILED, f"status 200 with an error: {piece.error}")
        if not piece.has_output and not piece.finish_reason:
            return self._not_of_this_api(text)
        answer.done = True
        answer.finish_reason = answer.finish_reason or "stop"
        return self._ended(answer)

    def _not_of_this_api(self, text: str) -> _End:
        return _End(Outcome.FAILED, f"not of /v1/{self._endpoint.path}: {one_line(text)}")

    def _ended(self, answer: Answer) -> _End:
        mark, key = self._endpoint.last_mark, self._endpoint.finish_key
        if answer.finish_reason in FAILED_FINISH_REASONS:
            return _End(Outcome.FAILED, f"{key} {answer.finish_reason}")
        if answer.done and answer.finish_reason is not None:
            return _End(Outcome.COMPLETED)
        if self._target.lenient and (answer.done or answer.finish_reason is not None):
            if answer.finished_s is None and answer.chunk_times_s:
                answer.finished_s = answer.chunk_times_s[-1]
            return _End(Outcome.COMPLETED, note=LENIENT.format(key if answer.done else mark))
        if answer.done:
            return _End(Outcome.CUT_OFF, f"{mark} without {key}")
        hint = "; --lenient counts such answers" if answer.finish_reason is not None else ""
        if answer.unread and not hint:
            hint = f"; it said: {one_line(answer.unread)}"
        return _End(Outcome.CUT_OFF, f"the stream ended without {mark}{hint}")


def _no_events(head: bytes) -> _End:
    text = one_line(head.decode("utf-8", errors="replace"))
    if not text:
        return _End(Outcome.CUT_OFF, "an empty answer (status 200)")
    if text.startswith((":", "data", "event", "id", "retry")):
        return _End(Outcome.CUT_OFF, "the stream ended before an event")
    return _End(Outcome.FAILED, f"neither events nor JSON: {text}")


def _encoded(body: dict[str, Any]) -> bytes:
    """JSON; a text that is not Unicode, such as half of an emoji, goes as escapes."""
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(body, separators=(",", ":")).encode()


def redirect_text(response: httpx.Response) -> str:
    """That the server is elsewhere, and where."""
    place = response.headers.get("location")
    where = f"to {response.url.join(place)}" if place else "without saying to where"
    return f"status {response.status_code}: redirects {where}; give --target the server itself"


def describe(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}".removesuffix(": "))
