"""An engine that does what a test tells it, request by request, and clients that send what they are told."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from starlette.types import Message, Receive, Scope, Send

JSON_TYPE = (b"content-type", b"application/json")
STREAM_TYPE = (b"content-type", b"text/event-stream")


class Broken(RuntimeError):
    """What a scripted engine raises."""


class Exchange:
    """One request as its client sees it, and as the engine does once it has been admitted."""

    def __init__(self, path: str, headers: dict[str, str]) -> None:
        self.path = path
        self.headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        self.incoming: asyncio.Queue[Message] = asyncio.Queue()
        self.orders: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self.sent: list[Message] = []
        self.engine_id = ""
        self.task: asyncio.Task[Any] | None = None
        self.admitted = self.heeds_disconnect = False

    @property
    def status(self) -> int:
        return next((one["status"] for one in self.sent if one["type"] == "http.response.start"), 0)

    @property
    def done(self) -> bool:
        return self.task is not None and self.task.done()

    @property
    def scope(self) -> Scope:
        return {
            "type": "http", "method": "POST", "path": self.path, "headers": [JSON_TYPE, *self.headers],
            "query_string": b"", "http_version": "1.1", "scheme": "http", "exchange": self,
        }  # fmt: skip

    async def receive(self) -> Message:
        return await self.incoming.get()

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    def body(self, part: bytes, more: bool = False) -> None:
        self.incoming.put_nowait({"type": "http.request", "body": part, "more_body": more})

    def disconnect(self) -> None:
        self.incoming.put_nowait({"type": "http.disconnect"})

    def order(self, name: str, value: Any = None) -> None:
        self.orders.put_nowait((name, value))


class ScriptedEngine:
    """An ASGI app that obeys an exchange's orders. `on_admitted` is told of each request that reaches it."""

    def __init__(
        self, count: Callable[[str, int, int], None], on_admitted: Callable[[Exchange], None]
    ) -> None:
        self._count, self._on_admitted = count, on_admitted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["exchange"]
        exchange.engine_id = dict(scope["headers"])[b"x-request-id"].decode()
        exchange.admitted = True
        self._on_admitted(exchange)
        json.loads((await receive())["body"])
        begun = False
        while True:
            name, value = await self._next(exchange, receive)
            if name == "raise":
                raise Broken
            if name == "gone":
                return
            if name == "count":
                self._count(f"cmpl-{exchange.engine_id}-{value[0]}", value[1], value[2])
                continue
            if not begun:
                status, kind = (value, JSON_TYPE) if name == "answer" else (200, STREAM_TYPE)
                await send({"type": "http.response.start", "status": status, "headers": [kind]})
                begun = True
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": name == "chunk"})
            if name in ("answer", "end"):
                return

    async def _next(self, exchange: Exchange, receive: Receive) -> tuple[str, Any]:
        if not exchange.heeds_disconnect:
            return await exchange.orders.get()
        order = asyncio.ensure_future(exchange.orders.get())
        message = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({order, message}, return_when=asyncio.FIRST_COMPLETED)
            return order.result() if order.done() else ("gone", None)
        finally:
            order.cancel()
            message.cancel()
