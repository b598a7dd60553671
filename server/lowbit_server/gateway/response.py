"""A response on its way to the client: headers added, errors in the route's shape, a failed stream marked as failed."""

import time
from collections.abc import Callable, Mapping

from starlette.types import Message, Send

from lowbit_server.gateway.anthropic_errors import with_limits
from lowbit_server.gateway.openai_errors import (
    ApiError,
    normalized,
    normalized_event,
    send_error,
    stream_event,
)
from lowbit_server.gateway.request_context import RequestContext
from lowbit_server.gateway.route_table import ErrorShape

QUEUE_FULL = (b"currently busy", b"backlog limit")  # in vLLM's two refusals (tests/contract checks them)
STREAM_HEADERS = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))  # for proxies that collect
ERROR_EVENTS: dict[
    ErrorShape, bytes
] = {  # the start of vLLM's event when a stream fails, where it is not OpenAI's
    "anthropic": b"event: error\n",
}
OPENAI_ERROR_EVENT = b'data: {"error"'


class ResponseWriter:
    """Passes the app's response on, adds headers, and puts errors in the route's shape.

    vLLM answers 503 when its queue is full; the client gets 429 with a `Retry-After`.
    """

    def __init__(
        self,
        send: Send,
        headers: Mapping[str, str],
        context: RequestContext | None = None,
        retry_after: Callable[[], int] | None = None,
        shape: ErrorShape = "openai",
    ) -> None:
        self._send, self._headers, self._context, self._retry_after = send, headers, context, retry_after
        self._shape: ErrorShape = context.route.errors if context is not None else shape
        if self._shape == "anthropic":
            self._headers = with_limits(headers)
        self._error_event = ERROR_EVENTS.get(self._shape, OPENAI_ERROR_EVENT)
        self._error: tuple[int, list[bytes]] | None = None
        self._begun = self._ended = self._streams = self._failed = False

    async def send(self, message: Message) -> None:
        """The ASGI `send` that the app is given."""
        if self._failed:
            return
        began = time.monotonic()
        if message["type"] == "http.response.start":
            await self._start(message)
        elif self._error is not None:
            self._error[1].append(message.get("body", b""))
            if not message.get("more_body"):
                await self._send_error()
        elif self._streams and message.get("body", b"").startswith(self._error_event):
            await self._end_failed(message["body"])
        else:
            self._ended = not message.get("more_body", False)
            if self._context is not None:
                self._context.response_ended = self._ended
                now = time.monotonic()
                if self._context.first_byte is None and message.get("body"):
                    self._context.first_byte = now
                self._context.overhead_s += now - began
            await self._send(message)

    async def fail(self, error: ApiError) -> None:
        """End the response with an error, whatever was sent so far; what the app still sends is dropped."""
        self._failed = True
        if not self._begun:
            self._note(error.status)
            await send_error(self._send, error, self._headers, self._shape)
        elif self._streams and not self._ended:
            event = stream_event(error, self._shape, self._request_id)
            await self._send({"type": "http.response.body", "body": event})

    async def _end_failed(self, event: bytes) -> None:
        """Make vLLM's error event the last one: the `[DONE]` that it sends afterwards is dropped."""
        self._failed = self._ended = True
        if self._context is not None:
            self._context.outcome = self._context.outcome or "error"
            self._context.response_ended = True
        last = normalized_event(event, self._prompt, self._shape, self._request_id)
        await self._send({"type": "http.response.body", "body": last})

    async def _start(self, message: Message) -> None:
        content_type = next((v for n, v in message.get("headers", ()) if n.lower() == b"content-type"), b"")
        if message["status"] >= 400 and not content_type.startswith(b"text/event-stream"):
            self._error = (message["status"], [])
            return
        self._note(message["status"])
        self._begun, self._streams = True, content_type.startswith(b"text/event-stream")
        extra = [(n.encode("latin-1"), v.encode("latin-1")) for n, v in self._headers.items()]
        extra += STREAM_HEADERS if self._streams else ()
        await self._send({**message, "headers": [*message.get("headers", ()), *extra]})

    async def _send_error(self) -> None:
        assert self._error is not None
        status, body = self._error[0], b"".join(self._error[1])
        headers = dict(self._headers)
        if status == 503 and self._retry_after is not None and any(mark in body for mark in QUEUE_FULL):
            status = 429
            headers["retry-after"] = str(self._retry_after())
        if self._headers or status != 503:  # what a probe says of the engine keeps its own shape
            status, body = normalized(status, body, self._prompt, self._shape, self._request_id)
        headers |= {"content-type": "application/json", "content-length": str(len(body))}
        self._note(status)
        self._begun = self._ended = True
        raw = [(n.encode("latin-1"), v.encode("latin-1")) for n, v in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})
        await self._send({"type": "http.response.body", "body": body})

    @property
    def _request_id(self) -> str:
        return self._headers.get("x-request-id", "")

    @property
    def _prompt(self) -> str | None:
        return self._context.route.prompt if self._context is not None else None

    def _note(self, status: int) -> None:
        if self._context is not None:
            self._context.status = status
