"""A request's body: read once, up to a limit, parsed, measured, and handed on."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from lowbit_server.gateway.openai_errors import ApiError
from lowbit_server.gateway.request_context import RequestContext
from lowbit_server.gateway.route_table import SCORED, Route
from lowbit_server.gateway.unicode_text import decoded

OUTPUT_FIELDS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
PROMPT_FIELDS = (
    "messages", "system", "prompt", "input", "instructions", "tools", "suffix", "tokens", "query", *SCORED,
)  # fmt: skip
ABSURD = 1 << 50  # larger numbers count as this; vLLM refuses them


class BufferedReceive:
    """An ASGI `receive` that first gives the body that was read, then the connection's messages or a disconnect."""

    def __init__(self, body: bytes, receive: Receive, context: RequestContext) -> None:
        self._body: bytes | None = body
        self._receive, self._context = receive, context
        self.pretend_disconnect = asyncio.Event()

    async def __call__(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if self.pretend_disconnect.is_set():  # also for an app that asks without waiting
            return {"type": "http.disconnect"}
        connection = asyncio.ensure_future(self._receive())
        pretended = asyncio.ensure_future(self.pretend_disconnect.wait())
        try:
            await asyncio.wait({connection, pretended}, return_when=asyncio.FIRST_COMPLETED)
            if not connection.done():
                return {"type": "http.disconnect"}
            message = connection.result()
        finally:
            connection.cancel()
            pretended.cancel()
        if (
            message["type"] == "http.disconnect"
            and not self._context.outcome
            and not self._context.response_ended
        ):
            self._context.outcome = "client_gone"
        return message


async def read_body(
    receive: Receive, headers: Headers, most: int, hold: Callable[[int], None] = lambda _count: None
) -> bytes:
    """The whole body, of at most `most` bytes; raises ApiError 413, or 400 where the connection closes.

    `hold` is told of bytes as they come, and may raise too.
    """
    declared = headers.get("content-length", "")
    too_large = ApiError(413, f"the request body is larger than {most} bytes", "body_size")
    if declared.isdigit() and int(declared) > most:
        raise too_large
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the connection closed before the request was complete", "incomplete")
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            raise too_large
        hold(len(part))
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


def parse(body: bytes, headers: Headers) -> dict[str, Any]:
    """The JSON object in a body; raises ApiError 415 or 400 for anything else."""
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        message = f"the content type is {content_type or 'not given'!r}; send application/json"
        raise ApiError(415, message, "content_type")
    document = decoded(body)
    if not isinstance(document, dict):
        raise ApiError(400, "the request body is not a JSON object", "json", code="invalid_json")
    return document


def output_tokens(document: dict[str, Any]) -> int | None:
    """Most output tokens that a request asks for each of its choices; None where it does not say."""
    given = [document[name] for name in OUTPUT_FIELDS if document.get(name) is not None]
    return max(map(_number, given)) if given else None


def choices(document: dict[str, Any]) -> int:
    """How many answers a request asks for to each prompt, kept or only generated."""
    return max(1, _number(document.get("n")), _number(document.get("best_of")))


def prompts(document: dict[str, Any], route: Route) -> int:
    """How many prompts a request holds: a list of token ids is one, a list of anything else is as many as it has."""
    return max(1, sum(_several(document.get(field)) for field in route.batch))


def _several(given: Any) -> int:
    if given is None:
        return 0
    if not isinstance(given, list) or not given or isinstance(given[0], int | float):
        return 1
    return len(given)


def prompt_characters(document: dict[str, Any]) -> int:
    """Length of everything that becomes the prompt: text as it is, anything else as JSON."""
    parts = (document[name] for name in PROMPT_FIELDS if name in document)
    return sum(len(part) if isinstance(part, str) else len(_json(part)) for part in parts)


def _json(part: Any) -> str:
    return json.dumps(part, ensure_ascii=False)


def _number(given: Any) -> int:
    """A number as vLLM reads it, from 0 to ABSURD: `"5"` and `5.0` are 5. What is none counts 0; vLLM refuses it."""
    try:
        number = given if isinstance(given, int) else float(given)
        return int(min(max(number, 0), ABSURD))
    except (TypeError, ValueError, OverflowError):
        return 0
