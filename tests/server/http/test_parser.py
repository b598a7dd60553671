"""What uvicorn with our bounds answers to heads that are too long, too slow, or made to smuggle a request."""

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from lowbit_server.http.endings import Times
from lowbit_server.http.parser import bounded_http

POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"


class Echo:
    """Counts the requests that get through."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.bodies.append(body)
        head = [(b"content-length", b"2"), (b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
async def port(echo: Echo) -> AsyncIterator[int]:
    http = bounded_http(4096, Times(head_s=0.5))
    server = uvicorn.Server(uvicorn.Config(echo, http=http, ws="none", lifespan="off", log_level="error"))
    listener = socket.create_server(("127.0.0.1", 0))
    serving = asyncio.create_task(server.serve([listener]))
    yield int(listener.getsockname()[1])
    server.should_exit = True
    await serving


async def answer(port: int, *parts: bytes) -> bytes:
    """All that comes back until the server closes, or for two seconds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(0.02)
    found = b""
    while not found.endswith(b"ok") and (part := await asyncio.wait_for(reader.read(4096), 2)):
        found += part
    writer.close()
    return found


async def test_a_plain_and_a_chunked_request_get_through(port: int, echo: Echo) -> None:
    assert (await answer(port, POST + b"Content-Length: 3\r\n\r\nabc")).startswith(b"HTTP/1.1 200")
    chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    assert (await answer(port, chunked)).startswith(b"HTTP/1.1 200")
    assert echo.bodies == [b"abc", b"abc"]


@pytest.mark.parametrize(
    "request_bytes",
    [
        POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nabc",
        POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        POST + b"Content-Length: +3\r\n\r\nabc",
        POST + b"Content-Length: 0x3\r\n\r\nabc",
        POST + b"Content-Length : 3\r\n\r\nabc",
        POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n",
        POST + b"X-A: b\r\n folded\r\nContent-Length: 3\r\n\r\nabc",
        POST + b"X-A: b\x00c\r\nContent-Length: 3\r\n\r\nabc",
        b"POST /v1/completions HTTP/9.9\r\nHost: a\r\n\r\n",
    ],
)
async def test_what_a_proxy_may_read_otherwise_is_400_and_the_connection_ends(
    port: int, echo: Echo, request_bytes: bytes
) -> None:
    found = await answer(port, request_bytes + POST + b"Content-Length: 8\r\n\r\nsmuggled")
    assert found.startswith(b"HTTP/1.1 400")
    assert b'"code": "invalid_request"' in found
    assert b"smuggled" not in b"".join(echo.bodies)
    assert found.count(b"HTTP/1.1") == 1


async def test_a_head_without_end_is_431(port: int, echo: Echo) -> None:
    found = await answer(port, POST, *(b"X-%d: %s\r\n" % (n, b"a" * 1000) for n in range(6)))
    assert found.startswith(b"HTTP/1.1 431")
    assert b'"code": "request_header_too_large"' in found
    assert echo.bodies == []


async def test_a_client_that_sends_no_head_is_closed(port: int) -> None:
    assert await answer(port, b"POST /v1/comp") == b""


async def test_a_body_may_take_longer_than_a_head(port: int, echo: Echo) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(POST + b"Content-Length: 6\r\n\r\nabc")
    await asyncio.sleep(0.8)
    writer.write(b"def")
    assert (await reader.read(12)).startswith(b"HTTP/1.1 200")
    assert echo.bodies == [b"abcdef"]
    writer.close()
