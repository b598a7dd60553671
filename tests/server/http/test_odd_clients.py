"""Clients and intermediaries that are none of the usual ones: what each gets, to the status, over raw sockets."""

import gzip

import pytest
from backports import zstd
from tests.server.http.odd_exchanges import CHAT, Exchange, request, sized
from tests.server.http.served import STATUS, Served

BODY = b'{"messages": []}'
CLOSE = b"Connection: close"
CHUNKED = b"Transfer-Encoding: chunked"
GZIPPED = gzip.compress(BODY, mtime=0)
IN_MEMBERS = b"".join(gzip.compress(part, mtime=0) for part in (BODY[:5], BODY[5:]))


def get(path: bytes, *headers: bytes, method: bytes = b"GET", version: bytes = b"HTTP/1.1") -> bytes:
    return b"\r\n".join([method + b" " + path + b" " + version, b"Host: a", *headers, CLOSE]) + b"\r\n\r\n"


def chunks(body: bytes, trailers: bytes = b"", extension: bytes = b"") -> bytes:
    return b"%x%s\r\n%s\r\n0\r\n%s\r\n" % (len(body), extension, body, trailers)


ANSWERED: dict[str, tuple[bytes, int]] = {
    "absolute form": (get(b"http://a/livez"), 200),
    "absolute form with a body": (request(BODY, b"Content-Length: 16", CLOSE, path=b"http://a" + CHAT), 200),
    "percent-encoded path": (get(b"/%6civez"), 200),
    "percent-encoded slash": (request(BODY, b"Content-Length: 16", CLOSE, path=b"/v1/chat%2Fcompletions"), 200),
    "slash at the end": (request(BODY, b"Content-Length: 16", CLOSE, path=CHAT + b"/"), 200),
    "slash at a probe's end": (get(b"/livez/"), 200),
    "dots are no way to another path": (get(b"/livez/../metrics"), 404),
    "two slashes": (get(b"//livez"), 404),
    "NUL in a path": (get(b"/livez%00"), 404),
    "query": (get(b"/livez?a=b&c"), 200),
    "asterisk": (get(b"*", method=b"OPTIONS"), 404),
    "a method of WebDAV": (get(b"/livez", method=b"PROPFIND"), 405),
    "QUERY": (get(b"/livez", method=b"QUERY"), 405),
    "TRACE": (get(b"/livez", b"Cookie: secret", method=b"TRACE"), 405),
    "CONNECT": (get(b"a:443", method=b"CONNECT"), 400),
    "unknown method": (get(b"/livez", method=b"FOO"), 400),
    "small letters": (get(b"/livez", method=b"get"), 400),
    "two lengths, the same": (request(BODY, b"Content-Length: 16", b"Content-Length: 16"), 400),
    "two lengths": (request(BODY, b"Content-Length: 16", b"Content-Length: 17"), 400),
    "a list of lengths": (request(BODY, b"Content-Length: 16, 16"), 400),
    "a signed length": (request(BODY, b"Content-Length: +16"), 400),
    "length and chunks": (request(chunks(BODY), b"Content-Length: 16", CHUNKED), 400),
    "chunk extensions": (request(chunks(BODY, extension=b';a=b;c="d"'), CHUNKED, CLOSE), 200),
    "chunk size of C": (request(b"0x10\r\n" + BODY + b"\r\n0\r\n\r\n", CHUNKED), 400),
    "chunks without CR": (request(b"10\n" + BODY + b"\n0\n\n", CHUNKED), 400),
    "trailers are no headers": (request(chunks(BODY, b"Content-Type: text/plain\r\n"), CHUNKED, CLOSE), 200),
    "CHUNKED": (request(chunks(BODY), b"Transfer-Encoding: CHUNKED", CLOSE), 200),
    "chunked twice": (request(chunks(BODY), b"Transfer-Encoding: chunked, chunked"), 400),
    "identity": (request(BODY, b"Transfer-Encoding: identity"), 400),
    "gzip without chunks": (request(GZIPPED, b"Transfer-Encoding: gzip"), 400),
    "gzip, then chunked": (request(chunks(GZIPPED), b"Transfer-Encoding: gzip, chunked", CLOSE), 200),
    "deflate, then chunked": (request(chunks(BODY), b"Transfer-Encoding: deflate, chunked", CLOSE), 415),
    "gzip as transfer and content": (
        request(chunks(GZIPPED), b"Transfer-Encoding: gzip, chunked", b"Content-Encoding: gzip", CLOSE), 415,
    ),
    "gzip twice": (sized(gzip.compress(GZIPPED, mtime=0), b"Content-Encoding: gzip, gzip", CLOSE), 415),
    "GZIP": (sized(GZIPPED, b"Content-Encoding: GZIP", CLOSE), 200),
    "gzip in members": (
        sized(IN_MEMBERS, b"Content-Encoding: gzip", CLOSE), 200,
    ),
    "junk after gzip": (sized(GZIPPED + b"junk", b"Content-Encoding: gzip", CLOSE), 400),
    "zstd behind a skippable frame": (
        sized(b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstd.compress(BODY), b"Content-Encoding: zstd", CLOSE), 200,
    ),
    "zstd bomb": (sized(zstd.compress(bytes(1 << 26)), b"Content-Encoding: zstd", CLOSE), 413),
    "folded header": (get(b"/livez", b"X-A: b", b" c"), 400),
    "space before a colon": (get(b"/livez", b"X-A : b"), 400),
    "NUL in a header": (get(b"/livez", b"X-A: b\0c"), 400),
    "lines without CR": (get(b"/livez").replace(b"\r\n", b"\n"), 400),
    "empty lines before": (b"\r\n\r\n" + get(b"/livez"), 200),
    "two hosts": (get(b"/livez", b"Host: b"), 400),
    "no host, as a simple prober": (b"GET /livez HTTP/1.1\r\nConnection: close\r\n\r\n", 200),
    "1,500 headers": (get(b"/livez", *[b"X-%d: y" % number for number in range(1500)]), 431),
    "a path of 9,000 bytes": (get(b"/" + b"a" * 9000), 431),
    "unknown expectation": (sized(BODY, b"Expect: 200-ok", CLOSE), 200),
    "range": (get(b"/livez", b"Range: bytes=0-1"), 200),
    "websocket": (get(b"/v1/realtime", b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: eA=="), 404),
    "websocket with a body": (sized(BODY, b"Connection: Upgrade, close", b"Upgrade: websocket"), 200),
    "TLS offered": (sized(BODY, b"Connection: Upgrade, close", b"Upgrade: TLS/1.0"), 200),
    "byte order mark": (sized(b"\xef\xbb\xbf" + BODY, CLOSE), 200),
    "UTF-16": (sized(BODY.decode().encode("utf-16"), CLOSE), 200),
    "PROXY protocol": (b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n" + get(b"/livez"), 400),
    "PROXY protocol 2": (b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c" + bytes(12) + get(b"/livez"), 400),
    "TLS on a plain port": (b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03", 400),
    "HTTP/2 at once": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "HTTP/1.2": (get(b"/livez", version=b"HTTP/1.2"), 400),
    "SSH": (b"SSH-2.0-OpenSSH_9.2\r\n", 400),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERED)
async def test_an_odd_client_gets_one_clear_answer(served: Served, name: str) -> None:
    sent, status = ANSWERED[name]
    found = await served.answers(Exchange((sent,), 0.0, "wait"))
    assert STATUS.findall(found) == [b"%d" % status], found
    if status >= 400:
        assert b'{"error": {"message": "' in found


async def test_a_body_where_none_is_due_is_not_read_as_the_next_request(served: Served) -> None:
    head = b"GET /v1/models HTTP/1.1\r\nHost: a\r\n"
    sized_body, chunked = (
        head + b"Content-Length: 5\r\n\r\nhello",
        head + CHUNKED + b"\r\n\r\n" + chunks(b"GET /x"),
    )
    found = await served.answers(Exchange((sized_body + chunked + get(b"/livez"),), 0.0, "wait"))
    assert STATUS.findall(found) == [b"200"] * 3


async def test_300_pipelined_requests_are_answered_in_turn_and_none_after_a_close(served: Served) -> None:
    one = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
    found = await served.answers(Exchange((one * 300 + get(b"/nowhere") + one,), 0.0, "wait"))
    assert STATUS.findall(found) == [b"200"] * 300 + [b"404"]
