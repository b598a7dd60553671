"""The transport against raw bytes: every split, every framing, and every way in which a server breaks off."""

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import pytest

from lowbit_loadtest.generate.http.transport import StreamTransport

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n7;x=1\r\n, world\r\n0\r\nT: 1\r\n\r\n"
SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\nhello, world"
CONTINUED = b"HTTP/1.1 100 Continue\r\n\r\n" + SIZED
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\n\r\nhello, world"


async def ask(handler: Handler, requests: int = 1) -> list[httpx.Response]:
    """Ask a server that lives for this call; requests one after the other through one transport."""
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, httpx.AsyncClient(transport=StreamTransport(), timeout=None) as http:
        return [await http.post(f"http://127.0.0.1:{port}/a?b=c", json={"n": 1}) for _ in range(requests)]


def answering(*pieces: bytes, close: bool = True) -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if close:
            writer.close()

    return handler


@pytest.mark.parametrize(
    "raw", [CHUNKED, SIZED, CONTINUED, UNTIL_CLOSE], ids=["chunked", "sized", "100", "close"]
)
def test_every_framing_in_every_split_gives_the_same_body(raw: bytes) -> None:
    async def all_splits() -> None:
        for size in (1, 2, 3, 7, 20, len(raw)):
            pieces = [raw[start : start + size] for start in range(0, len(raw), size)]
            (response,) = await ask(answering(*pieces))
            assert (response.status_code, response.content) == (200, b"hello, world")

    asyncio.run(all_splits())


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200", httpx.RemoteProtocolError),
        (b"SSH-2.0-x\r\n\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", httpx.RemoteProtocolError),
        (CHUNKED[:-20], httpx.RemoteProtocolError),
        (SIZED[:-1], httpx.RemoteProtocolError),
        (CHUNKED.replace(b"5\r\nhello", b"5\r\nhello!"), httpx.RemoteProtocolError),
        (CHUNKED.replace(b"5\r\nhello", b"zz\r\nhello"), httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\n" + b"x" * 70_000, httpx.RemoteProtocolError),
    ],
)
def test_broken_answers_are_protocol_errors_and_never_hang(raw: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        asyncio.run(asyncio.wait_for(ask(answering(raw)), 20))


def test_a_reset_is_a_read_error() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        sock = writer.get_extra_info("socket")
        sock.setsockopt(1, 13, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # SO_LINGER 0: close sends RST
        writer.transport.abort()

    with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
        asyncio.run(asyncio.wait_for(ask(handler), 20))


def test_a_connection_is_kept_and_one_that_the_server_closed_is_not_used_again() -> None:
    connections: list[int] = []

    def counting(per_connection: int) -> Handler:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections.append(0)
            for _ in range(per_connection):
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"POST /a?b=c HTTP/1.1\r\n")
                assert await reader.readexactly(7) == b'{"n":1}'
                connections[-1] += 1
                writer.write(CHUNKED)
            writer.close()

        return handler

    asyncio.run(ask(counting(5), 5))
    assert connections == [5]


def test_nobody_there_is_a_connect_error() -> None:
    async def ask_nobody() -> None:
        async with httpx.AsyncClient(transport=StreamTransport()) as http:
            await http.get("http://127.0.0.1:9/")

    with pytest.raises(httpx.ConnectError):
        asyncio.run(ask_nobody())


def test_a_large_answer_is_read_whole_with_a_bounded_buffer() -> None:
    body = bytes(range(256)) * 40_000  # 10 MB
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    (response,) = asyncio.run(ask(answering(raw)))
    assert response.content == body


def test_a_kept_connection_that_closes_as_we_write_is_not_a_failure() -> None:
    """The server's idle time ends just then: the request is sent again, on a new connection, once."""
    answered: list[int] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(7)
        writer.write(SIZED)
        answered.append(1)
        await reader.read(1)  # the next request comes, and is not answered
        writer.transport.abort()

    responses = asyncio.run(asyncio.wait_for(ask(handler, 4), 20))
    assert [response.content for response in responses] == [b"hello, world"] * 4
    assert len(answered) == 4


def test_a_server_that_closes_each_time_is_a_failure() -> None:
    connections: list[int] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(0)
        await reader.readuntil(b"\r\n\r\n")
        if len(connections) == 1:
            await reader.readexactly(7)
            writer.write(SIZED)
            await reader.read(1)
        writer.transport.abort()

    with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
        asyncio.run(asyncio.wait_for(ask(handler, 2), 20))
    assert len(connections) == 2


@pytest.mark.parametrize(
    ("version", "header", "connections"),
    [(b"1.1", b"", 1), (b"1.1", b"Connection: Close\r\n", 2), (b"1.1", b"Connection: x, close\r\n", 2),
     (b"1.0", b"", 2), (b"1.0", b"Connection: keep-alive\r\n", 1)],
)  # fmt: skip
def test_a_connection_is_kept_only_if_the_server_keeps_it(
    version: bytes, header: bytes, connections: int
) -> None:
    opened: list[int] = []
    raw = b"HTTP/%s 200 OK\r\n%sContent-Length: 12\r\n\r\nhello, world" % (version, header)

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(0)
        while True:
            try:
                await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                return
            await reader.readexactly(7)
            writer.write(raw)

    asyncio.run(asyncio.wait_for(ask(handler, 2), 20))
    assert len(opened) == connections


@pytest.mark.parametrize(
    "sent", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\nhello"]
)
def test_a_timeout_is_kept_wherever_the_server_falls_silent(sent: bytes) -> None:
    async def ask_silence() -> None:
        server = await asyncio.start_server(answering(sent, close=False), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, httpx.AsyncClient(transport=StreamTransport()) as http:
            await http.get(f"http://127.0.0.1:{port}/", timeout=0.05)

    with pytest.raises(httpx.ReadTimeout, match=r"nothing came within 0\.05 s"):
        asyncio.run(asyncio.wait_for(ask_silence(), 20))
