"""Seeded HTTP exchanges, malformed or odd, as bytes and pauses: what the tests of raw sockets send.

Four kinds: a request line and headers put together from odd parts, a sound request with bytes changed, a body that is
framed or encoded oddly, and several requests on one connection. Each is delivered whole or in pieces and ends in one of
several ways.
"""

import gzip
import json
import random
from dataclasses import dataclass

from backports import zstd

CHAT = b"/v1/chat/completions"
METHODS = (
    b"GET", b"POST", b"POST", b"POST", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"PATCH", b"TRACE", b"CONNECT", b"PRI",
    b"get", b"G ET", b"", b"POST\x00", b"X" * 300, b"QUERY", b"\xff\xfe",
)  # fmt: skip
TARGETS = (
    CHAT, CHAT, CHAT, b"/v1/models", b"/livez", b"/livez/", b"/livez?x", b"//livez", b"/./livez", b"/%6civez", b"*",
    b"http://example/v1/models", b"http://[::1]:1/x", b"example:443", b"", b"livez", b"/\xc3\xa9", b"/%00", b"/%zz",
    b"/a b", b"/" + b"a" * 9000, b"/?" + b"a=b&" * 500, b"/#x", b"/v1/models/org%2Fsmol", b"/metrics", b"/..//etc",
)  # fmt: skip
VERSIONS = (
    b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/9.9", b"",
    b"HTTP/1.1 x", b"http/1.1", b"HTTX/1.1", b"HTTP/1.", b"HTTP/11",
)  # fmt: skip
HEADERS = (
    b"Host: a", b"Host: b", b"Host:", b"Connection: close", b"Connection: keep-alive",
    b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"Upgrade: websocket",
    b"HTTP2-Settings: AAMAAABkAAQ", b"Sec-WebSocket-Key: eA==", b"Expect: 100-continue", b"Expect: 200-ok",
    b"Content-Length: 0", b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: 5, 5",
    b"Content-Length: 99999999999999999999", b"Content-Length: 1e3", b"Content-Length: ",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: chunked, chunked",
    b"Transfer-Encoding: identity", b"Transfer-Encoding:\x0bchunked", b"Content-Type: application/json",
    b"Content-Type: text/plain", b"Content-Encoding: gzip", b"Content-Encoding: br",
    b"X-Request-Id: " + b"i" * 500, b"X-Request-Id: \xe2\x82\xac", b"X-Request-Timeout: -1",
    b"X-Request-Timeout: 1e-9", b"Authorization: Bearer \xff", b"No colon here", b": no name", b"Bad Name: x",
    b"X-A : b", b" folded: x", b"\tfolded", b"X-Nul: a\x00b", b"X-Cr: a\rb", b"X-Long: " + b"y" * 6000,
    b"Trailer: X-A", b"TE: trailers", b"X-Forwarded-For: 1.2.3.4", b"Forwarded: for=1.2.3.4", b"Via: 1.0 x",
    b"Cookie: " + b"c=d; " * 50, b"Accept: \x7f",
)  # fmt: skip
ENDINGS = ("wait", "wait", "half close", "half close", "leave", "reset")


@dataclass(frozen=True)
class Exchange:
    """What a client sends, piece by piece, and how it ends; `pause_s` lies between two pieces."""

    pieces: tuple[bytes, ...]
    pause_s: float
    ending: str


def exchanges(number: int, seed: int) -> list[Exchange]:
    """So many exchanges, the same for the same seed."""
    kinds = (_assembled, _mutated, _framed, _pipelined)
    generator = random.Random(seed)
    return [_delivered(kinds[one % len(kinds)](generator), generator) for one in range(number)]


def chat(generator: random.Random) -> bytes:
    """A sound body, whole or streamed; sometimes long, sometimes not quite sound."""
    words = "x" * generator.choice((1, 10, 1000, 20_000))
    document = {
        "model": "tiny",
        "stream": generator.random() < 0.5,
        "messages": [{"role": "user", "content": words}],
    }
    body = json.dumps(document).encode()
    return generator.choice((body, body, body, body[:-1], b"", b"[]", b"\xff" + body, b'{"a":' * 5000))


def request(body: bytes, *headers: bytes, path: bytes = CHAT, version: bytes = b"HTTP/1.1") -> bytes:
    """A sound POST but for what is given."""
    head = [b"POST " + path + b" " + version, b"Host: a", b"Content-Type: application/json", *headers]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def sized(body: bytes, *headers: bytes) -> bytes:
    return request(body, b"Content-Length: %d" % len(body), *headers)


def _assembled(generator: random.Random) -> bytes:
    end = generator.choice((b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r"))
    sound = (b"POST", CHAT, b"HTTP/1.1")
    line = b" ".join(
        generator.choice(odd) if generator.random() < 0.4 else one
        for one, odd in zip(sound, (METHODS, TARGETS, VERSIONS), strict=True)
    )
    headers = generator.choices(HEADERS, k=generator.choice((0, 1, 1, 2, 4, 200)))
    body = chat(generator) if generator.random() < 0.7 else b""
    if body and generator.random() < 0.7:
        headers.append(b"Content-Length: %d" % len(body))
    return end.join([line, *headers]) + end * generator.choice((2, 2, 2, 1)) + body


def _mutated(generator: random.Random) -> bytes:
    sound = bytearray(sized(chat(generator), *generator.choices(HEADERS, k=2)))
    for _ in range(generator.choice((1, 2, 8))):
        place = generator.randrange(min(len(sound), 400))
        change = generator.randrange(3)
        if change == 0:
            sound[place] = generator.randrange(256)
        elif change == 1:
            del sound[place]
        else:
            sound.insert(place, generator.choice(b"\r\n\x00 :\xff"))
    return bytes(sound)


def _framed(generator: random.Random) -> bytes:
    body = chat(generator)
    way = generator.randrange(8)
    if way == 0:
        return request(body, b"Content-Length: %d" % (len(body) + generator.choice((1, 10_000))))
    if way == 1:
        return request(body, b"Content-Length: %d" % max(0, len(body) - 3))
    if way in (2, 3):
        name, code = generator.choice(((b"gzip", gzip.compress), (b"zstd", zstd.compress)))
        coded = code(bytes(10_000_000) if generator.random() < 0.3 else body)
        return sized(
            coded[: generator.choice((len(coded), len(coded), len(coded) // 2))], b"Content-Encoding: " + name
        )
    return request(b"".join(_chunks(body, generator)), b"Transfer-Encoding: chunked")


def _chunks(body: bytes, generator: random.Random) -> list[bytes]:
    size = generator.choice((1, 7, 1000)) if len(body) < 5000 else 1000
    parts = [body[begin : begin + size] for begin in range(0, len(body), size)]
    odd = generator.choice((b"", b"", b";x=y", b";" + b"e" * 5000, b" ", b"\x00", b"g"))
    chunks = [b"%x%s\r\n%s\r\n" % (len(part), odd, part) for part in parts]
    if generator.random() < 0.2:
        chunks.insert(generator.randrange(len(chunks) + 1), b"FFFFFFFFFFFFFFFFF\r\n")
    trailers = b"".join(generator.choices(HEADERS, k=generator.choice((0, 0, 2, 300))))
    last = b"0\r\n" + (trailers + b"\r\n" if trailers else b"") + b"\r\n"
    return [*chunks, generator.choice((last, last, last, b"0\r\n", b""))]


def _pipelined(generator: random.Random) -> bytes:
    whole = [
        sized(chat(generator)),
        b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /nowhere HTTP/1.1\r\nHost: a\r\n\r\n",
        b"HEAD /livez HTTP/1.1\r\nHost: a\r\n\r\n",
        sized(chat(generator), b"Connection: Upgrade", b"Upgrade: h2c"),
        b"GET /livez HTTP/1.0\r\n\r\n",
        b"\r\n\r\n",
    ]
    odd = [
        _assembled(generator),
        b"GET / HTTP/1.1\r\nX: " + b"y" * 9000,
        b"\x16\x03\x01\x00\xa5\x01\x00",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /live",
    ]
    return b"".join([*generator.choices(whole, k=generator.randrange(1, 6)), generator.choice([b"", *odd])])


def _delivered(sent: bytes, generator: random.Random) -> Exchange:
    way, ending = generator.randrange(4), generator.choice(ENDINGS)
    if way == 0 and len(sent) > 2:
        cuts = sorted(generator.sample(range(1, len(sent)), min(3, len(sent) - 1)))
        pieces = [sent[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
        return Exchange(tuple(pieces), 0.02, ending)
    if way == 1:
        return Exchange(
            (*(sent[one : one + 1] for one in range(min(60, len(sent)))), sent[60:]), 0.001, ending
        )
    if way == 2:
        return Exchange((sent[: generator.randrange(len(sent) + 1)],), 0.0, ending)  # cut short
    return Exchange((sent,), 0.0, ending)
