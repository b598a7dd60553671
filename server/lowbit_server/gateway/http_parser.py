"""uvicorn's HTTP parser with limits on the request head: its size, and how long a client may take to send it.

llhttp, the parser, refuses what could smuggle a request past a proxy: two lengths, a length together with chunks, a
space before a colon, folded headers (tests/server/test_http_parser.py). It has no limit on headers of its own.
"""

from asyncio import Transport
from asyncio.events import TimerHandle

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lowbit_server.gateway.openai_errors import error_document

HEAD_S = 30.0


class BoundedHttp(HttpToolsProtocol):
    """One connection. `head_s` are the seconds in which its first head must have arrived."""

    max_header_bytes = 64 << 10
    head_s = HEAD_S
    _head_bytes = 0
    _in_head = True
    _head_timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(self.head_s, self._close_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._head_bytes = self._head_bytes + len(data) if self._in_head else 0
        super().data_received(data)
        if self._in_head and self._head_bytes > self.max_header_bytes and not self.transport.is_closing():
            self._refuse(431, f"the request head is larger than {self.max_header_bytes} bytes")

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _close_if_silent(self) -> None:
        if self._in_head and not self.transport.is_closing():
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()

    def _refuse(self, status: int, message: str) -> None:
        body = error_document(status, message)
        head = (
            f"HTTP/1.1 {status} \r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def bounded_http(max_header_bytes: int) -> type[BoundedHttp]:
    """The protocol class with this limit, as uvicorn's configuration takes it."""
    return type("BoundedHttp", (BoundedHttp,), {"max_header_bytes": max_header_bytes})
