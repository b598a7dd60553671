"""How a connection's answers and the connection itself end, for clients as they are.

- A client may say that it sends no more and still read its answer (`nc -N`): a half-closed connection. One that has
  left looks the same until something is written to it, so it is asked: by `100 Continue`, which HTTP/1.1 lets a server
  send at any time before an answer, and in the middle of one by a zero before the next chunk's size. HTTP/1.0 has no
  such things: there the answer must begin within a few seconds.
- HTTP/1.0 has no chunks: a body of unknown length ends with the connection.
- Closing a socket with unread bytes resets it, which can take the answer from the client: so it is closed for writing
  first, and what comes is dropped until the client closes too.
- What is no request is refused after the answers to the requests before it, not in the middle of one.
"""

from asyncio import Transport
from asyncio.events import TimerHandle
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from lowbit_server.gateway.openai_errors import error_document

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
ZERO = b"0"  # of a chunk's size, which may have zeros before it (RFC 9112, 7.1)
OLD_VERSIONS = ("0.9", "1.0")
Send = Callable[[Any], Awaitable[None]]


@dataclass(frozen=True)
class Times:
    """Seconds. The gateway's own limit for a body, which has an answer, is below `body_s`."""

    head_s: float = 30.0  # for a head, from its first byte or the connection's begin
    body_s: float = 90.0  # for the rest of a request
    idle_s: int = 65  # between requests: above the 60 s of load balancers, so that they close first
    unread_s: float = 5.0  # for the rest of a request that is answered, and for a client to close
    stalled_s: float = 120.0  # for a client that takes nothing of its answer
    left_s: float = 5.0  # for the answer to begin, to an HTTP/1.0 client that may have left
    ask_s: tuple[float, ...] = (0.1, 0.5, 5.0, 15.0)  # between questions whether a client has left


DEFAULT_TIMES = Times()


class LingeringTransport:
    """The transport as a response sees it: closing is the protocol's, and writing never raises.

    uvloop raises RuntimeError between the end of a connection and `connection_lost`, which tells the response.
    """

    def __init__(self, transport: Transport, close: Callable[[], None]) -> None:
        self._write, self.is_closing, self.close = transport.write, transport.is_closing, close

    def write(self, data: bytes) -> None:
        try:
            self._write(data)
        except RuntimeError:
            return


class EndingHttp(HttpToolsProtocol):
    """One connection, with at most one deadline at a time. `ending`: what arrives is not read any more."""

    times = DEFAULT_TIMES
    in_head = True
    head_bytes = 0
    ending = False
    deadline: TimerHandle | None = None
    _half_closed = False
    _question: TimerHandle | None = None
    _refusal: bytes | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._lingering = LingeringTransport(transport, self._close)
        self.set_deadline(self.times.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self.set_deadline(None)
        self._unset_keepalive_if_required()
        if self._question is not None:
            self._question.cancel()
        super().connection_lost(exc)

    def set_deadline(self, seconds: float | None) -> None:
        """Cut the connection off in so many seconds, whatever was said before; None: no deadline."""
        if self.deadline is not None:
            self.deadline.cancel()
        self.deadline = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)

    # A request and its answer

    def request_begun(self, cycle: RequestResponseCycle) -> None:
        """A head has come; its request is about to be handled."""
        cycle.transport = self._lingering  # type: ignore[assignment]
        self._keep_alive = cycle.keep_alive
        if cycle.scope["http_version"] in OLD_VERSIONS:
            cycle.waiting_for_100_continue = False
            cycle.send = _without_chunks(cycle, cycle.send)  # type: ignore[assignment, method-assign]
        elif (
            cycle.waiting_for_100_continue
        ):  # refused, the body may never come: the bytes after it are no request
            cycle.keep_alive = False

    def request_arrived(self, cycle: RequestResponseCycle) -> None:
        """A request has come whole."""
        self.set_deadline(None)
        if not cycle.response_started:
            cycle.keep_alive = self._keep_alive
        elif cycle.response_complete:
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        answered_all = not self.pipeline
        super().on_response_complete()
        if answered_all and self._refusal is not None:
            self._send_refusal()
        elif self.ending:
            self._unset_keepalive_if_required()
        elif not self.in_head:
            self.set_deadline(self.times.unread_s)

    def shutdown(self) -> None:
        self._keep_alive = False
        super().shutdown()

    # A client that does not read

    def pause_writing(self) -> None:
        super().pause_writing()
        self.set_deadline(self.times.stalled_s)

    def resume_writing(self) -> None:
        super().resume_writing()
        in_body = None if self.in_head else self.times.body_s
        self.set_deadline(self.times.head_s if self.head_bytes else in_body)

    # A client that sends no more

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays open for writing; TLS has no such thing."""
        if self.ending or self.scheme == "https":
            return False
        self._half_closed = True
        if not self.in_head or self.head_bytes:
            self.refuse(400, "the connection ended before the request did")
        waits = self.cycle is not None and not self.cycle.response_complete
        if waits and self.in_head:
            self.cycle.keep_alive = self._keep_alive = False
            old = self.cycle.scope["http_version"] in OLD_VERSIONS
            ask, wait_s = (self._leave, self.times.left_s) if old else (self._ask, 0.0)
            self._question = self.loop.call_later(wait_s, ask)
        return waits

    def _leave(self) -> None:
        if not self.cycle.response_started:
            self.transport.abort()

    def _ask(self, number: int = 0) -> None:
        """A client that has left answers with a reset, which the next write meets; so does a piece of an answer."""
        cycle, few = self.cycle, number < len(self.times.ask_s)  # so few zeros that no parser minds
        if cycle.response_complete or (cycle.response_started and not (few and cycle.chunked_encoding)):
            return
        if not self.pipeline:
            self.transport.write(ZERO if cycle.response_started else CONTINUE)
        wait_s = self.times.ask_s[min(number, len(self.times.ask_s) - 1)]
        self._question = self.loop.call_later(wait_s, self._ask, number + 1)

    # What is no request

    def refuse(self, status: int, message: str) -> None:
        """Answer an error and end the connection, once the requests before are answered."""
        if self.ending:
            return
        body = error_document(status, message)
        head = (
            f"HTTP/1.1 {status} \r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.ending, self._refusal = True, head.encode() + body
        last = self.cycle
        if last is None or last.response_complete:
            self._send_refusal()
        elif not self.in_head:  # this request's own body is broken
            self._refuse_broken(last)

    def _refuse_broken(self, cycle: RequestResponseCycle) -> None:
        if self.pipeline:  # not begun: the refusal is its answer, in its turn
            self.pipeline.popleft()
        elif cycle.response_started:
            self.transport.close()
        else:
            cycle.disconnected = True
            cycle.message_event.set()
            self._send_refusal()

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, msg)

    def _send_refusal(self) -> None:
        if self._refusal is not None and not self.transport.is_closing():
            self.transport.write(self._refusal)
            self._linger()

    # The end

    def timeout_keep_alive_handler(self) -> None:
        self._linger()

    def _close(self) -> None:
        if self.in_head:
            self.transport.close()
            self._bound_the_end()
        else:
            self._linger()

    def _linger(self) -> None:
        self.ending = True
        if self._half_closed:
            self.transport.close()
        else:
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self.flow.resume_reading()
        self._bound_the_end()

    def _bound_the_end(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        self.set_deadline(self.times.stalled_s if unsent else self.times.unread_s)


def _without_chunks(cycle: RequestResponseCycle, send: Send) -> Send:
    """The ASGI `send` of an HTTP/1.0 request: a body without a length is written as it is."""
    plain = False

    async def send_plain(message: Any) -> None:
        nonlocal plain
        if message["type"] == "http.response.start":
            sized = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            plain = not sized and cycle.scope["method"] != "HEAD"
            if plain:
                cycle.scope = {
                    **cycle.scope,
                    "method": "HEAD",
                }  # uvicorn then neither frames nor writes a body
        elif plain and not cycle.disconnected:
            await cycle.flow.drain()
            cycle.transport.write(message.get("body", b""))
        await send(message)

    return send_plain
