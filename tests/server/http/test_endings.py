"""How answers and connections end: clients that half-close, speak HTTP/1.0, ask to upgrade, or never finish."""

import asyncio
import http.client
import json
import re
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from tests.server.http.raw_sockets import read_to_the_end

from lowbit_server.http.endings import Times
from lowbit_server.http.parser import bounded_http

TIMES = Times(head_s=0.4, body_s=0.6, unread_s=0.4, stalled_s=0.6, left_s=0.5, ask_s=(0.05, 0.1))
POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"


class App:
    """`/stream` answers in pieces, `/pause` in two, the second late, `/slow` late, `/refuse` without reading.

    Others answer with what they read.
    """

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.disconnects = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        body = b"" if path == "/refuse" else await self._body(receive)
        if body is None:
            return
        headers = [(name.decode(), value.decode()) for name, value in scope["headers"]]
        self.seen.append({"method": scope["method"], "path": path, "body": body.decode(), "headers": headers})
        if path == "/slow" and await self._gone_within(receive, 1.0):
            return
        if path == "/pause":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"piece 0\n", "more_body": True})
            if not await self._gone_within(receive, 1.0):
                await send({"type": "http.response.body", "body": b"piece 1\n"})
            return
        if path in ("/stream", "/flood"):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for number in range(3 if path == "/stream" else 3000):
                piece = b"piece %d\n" % number if path == "/stream" else b"x" * 65536
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                await asyncio.sleep(0.01 if path == "/stream" else 0)
            await send({"type": "http.response.body", "body": b""})
            return
        text = b"refused" if path == "/refuse" else json.dumps(self.seen[-1]).encode()
        length = [(b"content-length", b"%d" % len(text))]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": text})

    async def _body(self, receive: Receive) -> bytes | None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnects += 1
                return None
            body, more = body + message.get("body", b""), message.get("more_body", False)
        return body

    async def _gone_within(self, receive: Receive, seconds: float) -> bool:
        try:
            message = await asyncio.wait_for(receive(), seconds)
        except TimeoutError:
            return False
        self.disconnects += message["type"] == "http.disconnect"
        return True


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
async def port(app: App) -> AsyncIterator[int]:
    config = uvicorn.Config(app, http=bounded_http(4096, TIMES), ws="none", lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    serving = asyncio.create_task(server.serve([listener]))
    yield int(listener.getsockname()[1])
    server.should_exit = True
    await serving


async def exchange(port: int, *parts: bytes, half_close: bool = False, pause_s: float = 0.02) -> bytes:
    """All that comes back until the server closes, which it must within its bounds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(pause_s)
    if half_close:
        writer.write_eof()
    found = await asyncio.wait_for(reader.read(-1), 5)
    writer.close()
    return found


def split(found: bytes) -> tuple[bytes, bytes]:
    head, _, body = found.partition(b"\r\n\r\n")
    return head.lower(), body


@pytest.mark.parametrize(
    "offer", [UPGRADE, UPGRADE.lower(), b"Connection: upgrade\r\nUpgrade: websocket\r\n"]
)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("cut", [0, 40, 200])
async def test_an_offer_to_upgrade_is_declined_and_the_body_arrives(
    port: int, app: App, offer: bytes, chunked: bool, cut: int
) -> None:
    length = (
        b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
        if chunked
        else b"Content-Length: 3\r\n\r\nabc"
    )
    sent = POST + offer + length + b"GET /next HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    found = await exchange(port, sent[:cut], sent[cut:])
    assert found.count(b"HTTP/1.1 200") == 2
    assert [(one["method"], one["path"], one["body"]) for one in app.seen] == [
        ("POST", "/v1/completions", "abc"),
        ("GET", "/next", ""),
    ]


async def test_an_offer_without_a_body_is_declined(port: int, app: App) -> None:
    found = await exchange(
        port, b"GET /v1/models HTTP/1.1\r\nHost: a\r\n" + UPGRADE + b"\r\n", half_close=True
    )
    assert b"HTTP/1.1 200" in found
    assert [name for name, _ in app.seen[0]["headers"]] == ["host", "connection"]


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_a_half_closed_client_gets_its_answer(port: int, version: bytes) -> None:
    for path in (b"/whole", b"/stream"):
        found = await exchange(port, b"GET %s HTTP/%s\r\nHost: a\r\n\r\n" % (path, version), half_close=True)
        assert b" 200 OK" in found
        last = {
            b"/whole": rb"}",
            b"/stream": rb"piece 2\n" + (rb"\r\n0+\r\n\r\n" if version == b"1.1" else b""),
        }
        assert re.search(last[path] + rb"\Z", found)


async def test_a_half_closed_client_gets_the_answers_to_all_it_sent(port: int) -> None:
    found = await exchange(port, b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n" * 3, half_close=True)
    assert found.count(b"0\r\n\r\n") == 3


async def test_a_slow_answer_reaches_a_half_closed_client(port: int, app: App) -> None:
    found = await exchange(port, b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n", half_close=True)
    assert found.startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert b"HTTP/1.1 200 OK" in found
    assert app.disconnects == 0


async def test_a_client_that_has_left_is_noticed_before_the_answer(port: int, app: App) -> None:
    for version in (b"1.0", b"1.1"):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /slow HTTP/%s\r\nHost: a\r\n\r\n" % version)
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.close()
    await asyncio.sleep(0.8)
    assert app.disconnects == 2


async def test_a_client_that_has_left_is_noticed_between_two_pieces(port: int, app: App) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /pause HTTP/1.1\r\nHost: a\r\n\r\n")
    await reader.readuntil(b"piece 0\n\r\n")
    writer.close()
    await asyncio.sleep(0.4)  # the next piece comes after 1 s
    assert app.disconnects == 1


async def test_a_half_closed_client_that_waits_for_a_piece_gets_it(port: int, app: App) -> None:
    """What asks whether it has left is no part of the body."""

    def fetched() -> bytes:
        client = http.client.HTTPConnection("127.0.0.1", port)
        client.request("GET", "/pause")
        client.sock.shutdown(socket.SHUT_WR)
        return client.getresponse().read()

    assert await asyncio.to_thread(fetched) == b"piece 0\npiece 1\n"
    assert app.disconnects == 0


@pytest.mark.parametrize(
    "sent",
    [POST + b"Content-Length: 10\r\n\r\nabc", POST[:20], POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nab"],
)
async def test_a_request_cut_short_by_a_half_close_is_400(port: int, app: App, sent: bytes) -> None:
    found = await exchange(port, sent, half_close=True)
    assert found.startswith(b"HTTP/1.1 400")
    assert app.seen == []


async def test_http_10_gets_no_chunks_and_its_connection_ends(port: int) -> None:
    head, body = split(await exchange(port, b"GET /stream HTTP/1.0\r\n\r\n"))
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert body == b"piece 0\npiece 1\npiece 2\n"
    head, body = split(await exchange(port, b"GET /whole HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"))
    assert b"content-length: %d" % len(body) in head


async def test_head_has_the_length_and_no_body(port: int) -> None:
    head, body = split(await exchange(port, b"HEAD /whole HTTP/1.1\r\nHost: a\r\n\r\n", half_close=True))
    assert b"content-length: " in head
    assert body == b""


@pytest.mark.parametrize(
    "begin", [b"", b"GET /one HTTP/1.1\r\nHost: a\r\n\r\n", POST + b"Content-Length: 1\r\n\r\nx"]
)
@pytest.mark.parametrize("drip", [b"GET /two HTTP/1.1\r\n", b"G", b"\r\n"])
async def test_a_head_that_never_ends_is_closed_whichever_request_it_is(
    port: int, app: App, begin: bytes, drip: bytes
) -> None:
    began = asyncio.get_running_loop().time()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(begin)
    await asyncio.sleep(0.1)
    writer.write(drip)

    async def go_on() -> None:
        while True:
            await asyncio.sleep(0.1)
            writer.write(b"X-A: b\r\n" if len(drip) > 2 else b"\r\n" if drip == b"\r\n" else b"E")

    dripping = asyncio.create_task(go_on())
    found = await asyncio.wait_for(read_to_the_end(reader), 3)
    dripping.cancel()
    writer.close()
    assert found.count(b" 200 OK") == bool(begin)
    assert asyncio.get_running_loop().time() - began < 1.5
    assert len(app.seen) == bool(begin)


async def test_a_second_head_without_end_is_431(port: int) -> None:
    found = await exchange(
        port,
        b"GET /one HTTP/1.1\r\nHost: a\r\n\r\n",
        POST,
        *(b"X-%d: %s\r\n" % (n, b"a" * 1000) for n in range(6)),
    )
    assert found.count(b"HTTP/1.1 200") == found.count(b"HTTP/1.1 431") == 1


async def test_a_large_head_in_one_piece_is_431_and_a_large_body_is_none(port: int, app: App) -> None:
    for body in (b"", b"Content-Length: 9\r\n\r\n{}"):
        found = await exchange(port, POST + b"X: " + b"a" * 5000 + b"\r\n" + body + b"\r\n")
        assert found.startswith(b"HTTP/1.1 431")
        assert found.count(b"HTTP/1.1") == 1
    assert app.seen == []
    sent = POST + b"Connection: close\r\nContent-Length: 60000\r\n\r\n" + b"b" * 60000
    assert (await exchange(port, sent)).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "endless",
    [
        [b"1;" + b"x" * 3000, b"x" * 3000],  # a chunk's extension
        [b"1\r\na\r\n0\r\n", *(b"X-%d: %s\r\n" % (n, b"a" * 1000) for n in range(9))],  # trailers
        [b"1\r\na\r\n0\r\nX: " + b"a" * 3000, b"a" * 9000],  # one trailer
    ],
)
async def test_what_frames_a_body_is_bounded(port: int, app: App, endless: list[bytes]) -> None:
    found = await exchange(port, POST + b"Transfer-Encoding: chunked\r\n\r\n", *endless)
    assert found.startswith(b"HTTP/1.1 431")
    assert app.seen == []


async def test_a_trailer_is_no_header(port: int, app: App) -> None:
    sent = (
        POST
        + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n1\r\na\r\n0\r\nAuthorization: Bearer x\r\n\r\n"
    )
    await exchange(port, sent)
    assert [name for name, _ in app.seen[0]["headers"]] == ["host", "transfer-encoding", "connection"]


async def test_a_body_in_pieces_of_a_byte_passes(port: int, app: App) -> None:
    sent = (
        POST
        + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        + b"1\r\na\r\n" * 20000
        + b"0\r\n\r\n"
    )
    await exchange(port, sent)
    assert app.seen[0]["body"] == "a" * 20000


async def test_a_body_that_never_comes_ends_the_connection(port: int, app: App) -> None:
    assert await exchange(port, POST + b"Content-Length: 10\r\n\r\nabc") == b""
    assert app.disconnects == 1


async def test_an_answer_before_the_body_reaches_a_client_that_still_sends(port: int) -> None:
    sent = POST.replace(b"/v1/completions", b"/refuse") + b"Content-Length: 30000000\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    for _ in range(100):
        writer.write(b"x" * 100_000)
        await asyncio.sleep(0)
    assert (await asyncio.wait_for(reader.readuntil(b"refused"), 2)).startswith(b"HTTP/1.1 200")
    await asyncio.wait_for(read_to_the_end(reader), 3)
    writer.close()


async def test_the_rest_of_an_answered_request_is_no_request(port: int, app: App) -> None:
    hidden = b"GET /hidden HTTP/1.1\r\nHost: a\r\n\r\n"
    refuse = POST.replace(b"/v1/completions", b"/refuse") + b"Content-Length: %d\r\n" % len(hidden)
    found = await exchange(
        port, refuse + b"\r\n", hidden + b"GET /next HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    )
    assert [one["path"] for one in app.seen] == ["/refuse", "/next"]
    found = await exchange(port, refuse + b"Expect: 100-continue\r\n\r\n", hidden)
    head, body = split(found)
    assert b"connection: close" in head
    assert body == b"refused"
    assert [one["path"] for one in app.seen] == ["/refuse", "/next", "/refuse"]


async def test_expect_is_continued_when_the_body_is_read(port: int, app: App) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(POST + b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\n")
    assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 2) == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"abc")
    assert (await asyncio.wait_for(reader.readuntil(b"}"), 2)).startswith(b"HTTP/1.1 200")
    writer.write(b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n")
    assert (await asyncio.wait_for(reader.readuntil(b"}"), 2)).startswith(b"HTTP/1.1 200")
    writer.close()


@pytest.mark.parametrize(
    "junk",
    [
        b"\x16\x03\x01\x02junk\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nX : y\r\n\r\n",
    ],
)
async def test_junk_after_a_request_does_not_break_its_answer(port: int, junk: bytes) -> None:
    stream = b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n"
    found = await exchange(port, stream + stream + junk)
    first, second, refusal = found.split(b"\r\n0\r\n\r\n")
    assert first.endswith(b"piece 2\n")
    assert second.endswith(b"piece 2\n")
    assert refusal.startswith(b"HTTP/1.1 400")


async def test_a_client_that_reads_nothing_is_cut_off(port: int, app: App) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    writer.write(b"GET /flood HTTP/1.1\r\nHost: a\r\n\r\n")
    await asyncio.sleep(1.5)
    found = await asyncio.wait_for(read_to_the_end(reader), 5)
    writer.close()
    assert not found.endswith(b"0\r\n\r\n")
