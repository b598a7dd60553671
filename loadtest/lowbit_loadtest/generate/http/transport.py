"""A lean HTTP/1.1 transport for httpx: what a load generator needs of httpcore, at a quarter of its price.

httpx over httpcore, h11 and anyio takes about 100 µs of Python for each small chunk of a stream, so one worker
falls behind at some 3,000 events a second. This one reads with an asyncio Protocol and stamps bytes when the event
loop hands them over, before any task runs: `extensions["arrival_clock"]` gives that moment. It speaks what servers of
streams send (content-length, chunked, until close; TLS) and no proxies, HTTP/2 or upgrades; through a proxy httpx's own
transport is used.
"""

import asyncio
import ssl
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable

import httpx

MOST_HEAD_BYTES = 64 << 10
MOST_BUFFERED_BYTES = 1 << 20  # then the socket waits, and the server with it
MOST_IDLE_S = 4.0  # uvicorn closes idle connections after 5 s; a request must not meet that moment

Origin = tuple[str, str, int]


class StreamTransport(httpx.AsyncBaseTransport):
    """Keeps idle connections; opens as many as are needed at once."""

    def __init__(self, make_ssl: Callable[[], ssl.SSLContext] = httpx.create_ssl_context) -> None:
        self._idle: defaultdict[Origin, list[_Connection]] = defaultdict(list)
        self._make_ssl = make_ssl  # only where it is needed: it reads every certificate
        self._ssl: ssl.SSLContext | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = await request.aread()
        url = request.url
        origin = (url.scheme, url.host, url.port or (443 if url.scheme == "https" else 80))
        sent = _head_of(request) + body
        kept = self._idle_connection(origin)
        limits = request.extensions.get("timeout", {})
        connection = kept or await self._connect(origin, limits.get("connect"))
        connection.most_wait_s = limits.get("read")
        try:
            status, headers, keeps = await connection.ask(sent)
        except (httpx.ReadError, httpx.RemoteProtocolError):
            connection.close()
            if kept is None or connection.answered:
                raise
            connection = await self._connect(
                origin, limits.get("connect")
            )  # a kept one closed just as we wrote
            connection.most_wait_s = limits.get("read")
            status, headers, keeps = await connection.ask(sent)
        empty = request.method == "HEAD" or status in (204, 304)
        stream = _Body(self, origin, connection, headers, empty, keeps)
        clock = connection.arrival_clock
        return httpx.Response(status, headers=headers, stream=stream, extensions={"arrival_clock": clock})

    async def aclose(self) -> None:
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        self._idle.clear()

    def keep(self, origin: Origin, connection: "_Connection") -> None:
        """Take back a connection whose answer was read to its end."""
        connection.idle_since_s = time.monotonic()
        self._idle[origin].append(connection)

    def _idle_connection(self, origin: Origin) -> "_Connection | None":
        connections = self._idle[origin]
        while connections:
            connection = connections.pop()
            if not connection.closed and time.monotonic() - connection.idle_since_s < MOST_IDLE_S:
                return connection
            connection.close()
        return None

    async def _connect(self, origin: Origin, timeout_s: float | None) -> "_Connection":
        scheme, host, port = origin
        if scheme == "https" and self._ssl is None:
            self._ssl = self._make_ssl()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                _, connection = await loop.create_connection(
                    _Connection, host, port, ssl=self._ssl if scheme == "https" else None
                )
        except TimeoutError:
            raise httpx.ConnectTimeout(f"no connection within {timeout_s:g} s") from None
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error
        return connection


class _Connection(asyncio.Protocol):
    """One connection: bytes wait in `buffer` until a task reads them."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.closed = False
        self.answered = False  # whether bytes of the answer to the last request have come
        self.idle_since_s = 0.0
        self.most_wait_s: float | None = (
            None  # for the next bytes; None: whoever asks has a deadline of its own
        )
        self._arrived_s = 0.0
        self.error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._arrived_s = time.monotonic()
        self.answered = True
        self.buffer += data
        if len(self.buffer) > MOST_BUFFERED_BYTES:
            self._paused = True
            self.transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed, self.error = True, exc
        self._wake()

    def arrival_clock(self) -> float:
        """When the newest bytes came."""
        return self._arrived_s

    def close(self) -> None:
        if not self.closed:
            self.transport.abort()

    def take(self, size: int | None = None) -> bytes:
        """The first `size` bytes of the buffer, or all."""
        data = bytes(self.buffer[:size])
        del self.buffer[:size]
        if self._paused and not self.closed:
            self._paused = False
            self.transport.resume_reading()
        return data

    async def more(self, expected: str) -> None:
        """Wait for bytes; httpx's errors when none will come."""
        if self.closed:
            if self.error is not None:
                raise httpx.ReadError(f"{type(self.error).__name__}: {self.error}") from self.error
            raise httpx.RemoteProtocolError(f"the server closed the connection before {expected}")
        self._waiter = asyncio.get_running_loop().create_future()
        if self.most_wait_s is None:
            await self._waiter
            return
        try:
            async with asyncio.timeout(self.most_wait_s):
                await self._waiter
        except TimeoutError:
            raise httpx.ReadTimeout(f"nothing came within {self.most_wait_s:g} s") from None

    async def line(self, expected: str) -> bytes:
        """The buffer up to the next CRLF, without it."""
        while (end := self.buffer.find(b"\r\n")) < 0:
            if len(self.buffer) > MOST_HEAD_BYTES:
                raise httpx.RemoteProtocolError(f"no end of line in {MOST_HEAD_BYTES} bytes")
            await self.more(expected)
        return self.take(end + 2)[:-2]

    async def ask(self, request: bytes) -> tuple[int, httpx.Headers, bool]:
        """Send a request and read its answer's head; the connection is closed where that fails."""
        self.answered = False
        try:
            self.transport.write(request)
            return await self._read_head()
        except BaseException:
            self.close()
            raise

    async def _read_head(self) -> tuple[int, httpx.Headers, bool]:
        """Status and headers of the final answer (1xx are passed over), and whether the server keeps the connection."""
        status = 100
        while status < 200:
            first = await self.line("it answered")
            parts = first.split(maxsplit=2)
            if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit():
                raise httpx.RemoteProtocolError(f"not an HTTP/1.1 answer: {first[:80]!r}")
            status = int(parts[1])
            headers = []
            while line := await self.line("the end of its headers"):
                name, colon, value = line.partition(b":")
                if not colon:
                    raise httpx.RemoteProtocolError(f"not a header: {line[:80]!r}")
                headers.append((name, value.strip()))
        found = httpx.Headers(headers)
        said = {token.strip().lower() for token in found.get("connection", "").split(",")}
        return status, found, "keep-alive" in said if parts[0] == b"HTTP/1.0" else "close" not in said

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Body(httpx.AsyncByteStream):
    """An answer's body. Read to its end, its connection is kept; closed before, it is dropped."""

    def __init__(
        self,
        owner: StreamTransport,
        origin: Origin,
        connection: _Connection,
        headers: httpx.Headers,
        empty: bool,
        keeps: bool,
    ) -> None:
        self._owner, self._origin, self._connection, self._headers = owner, origin, connection, headers
        self._empty, self._keeps = empty, keeps
        self._complete = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        length = self._headers.get("content-length", "").partition(",")[0].strip()
        coding = self._headers.get("transfer-encoding", "").lower()
        reusable = self._keeps
        if self._empty:
            pass
        elif coding not in ("", "chunked", "identity"):
            raise httpx.RemoteProtocolError(f"transfer-encoding {coding!r} was not asked for")
        elif coding == "chunked":
            async for data in self._chunked():
                yield data
        elif length.isdigit():
            async for data in self._sized(int(length)):
                yield data
        else:
            reusable = False
            async for data in self._until_close():
                yield data
        self._complete = reusable

    async def aclose(self) -> None:
        if self._complete and not self._connection.closed and not self._connection.buffer:
            self._owner.keep(self._origin, self._connection)
        else:
            self._connection.close()
        self._complete = False

    async def _chunked(self) -> AsyncIterator[bytes]:
        """Chunk by chunk; one that has come in part, as its parts come."""
        connection, expected = self._connection, "the end of the stream"
        while True:
            line = await connection.line(expected)
            try:
                size = int(line.partition(b";")[0], 16)
            except ValueError:
                raise httpx.RemoteProtocolError(f"not a chunk's size: {line[:80]!r}") from None
            if size == 0:
                break
            async for data in self._sized(size):
                yield data
            if await connection.line(expected):
                raise httpx.RemoteProtocolError("a chunk is longer than its size")
        while await connection.line(expected):
            pass  # trailers

    async def _sized(self, size: int) -> AsyncIterator[bytes]:
        while size:
            while not self._connection.buffer:
                await self._connection.more("the end of the body")
            data = self._connection.take(size)
            size -= len(data)
            yield data

    async def _until_close(self) -> AsyncIterator[bytes]:
        connection = self._connection
        while True:
            while not connection.buffer:
                if connection.closed and connection.error is None:
                    return
                await connection.more("the end of the body")
            yield connection.take()


def _head_of(request: httpx.Request) -> bytes:
    target = request.url.raw_path
    lines = [b"%s %s HTTP/1.1" % (request.method.encode(), target)]
    lines += [b"%s: %s" % header for header in request.headers.raw]
    if any(b"\r" in line or b"\n" in line for line in lines):  # it would begin a header of its own
        raise httpx.LocalProtocolError("a line break in a header or a URL")
    return b"\r\n".join(lines) + b"\r\n\r\n"
