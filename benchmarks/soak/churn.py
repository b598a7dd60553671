"""What the clients of a soak do: good requests, and every way of ours to leave one, break one or be refused.

Each kind knows how it must end, and adds to `Expected` what the server has to have counted for it.
"""

import asyncio
import contextlib
import gzip
import json
import random
import re
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from backports import zstd

CHAT = "/v1/chat/completions"
TOKEN = re.compile(rb'"content":"[^"]')
LONG = 300  # tokens of a request that is not to end by itself: 9 s of the mock engine
MOST_WORDS = 20
READ_S = 120.0
HEAD_S = 30.0  # the server's own bound for a head
FREE_S = 5.0  # within which a left request's place is free again
RESET = struct.pack("ii", 1, 0)


@dataclass
class Expected:
    """What the server must have counted, and what went otherwise than it should."""

    requests: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    rejections: Counter[str] = field(default_factory=Counter)
    whole_tokens: int = 0  # generated for the key `whole`, all of whose requests end well
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def ended(self, outcome: str) -> None:
        self.outcomes[outcome] += 1

    def rejected(self, reason: str) -> None:
        self.outcomes["rejected"] += 1
        self.rejections[reason] += 1


class Connection:
    """One raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer, self.found = reader, writer, b""

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def end(self) -> bytes:
        """Everything until the server closes."""
        with contextlib.suppress(ConnectionError):
            while part := await asyncio.wait_for(self.reader.read(65536), READ_S):
                self.found += part
        return self.found

    async def until(self, pattern: re.Pattern[bytes]) -> None:
        """Read until something has come; EOFError where the server closes before."""
        while not pattern.search(self.found):
            part = await asyncio.wait_for(self.reader.read(65536), READ_S)
            if not part:
                raise EOFError(self.found[:300])
            self.found += part

    def reset(self) -> None:
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


class Clients:
    """The kinds of request, and what is needed to send them.

    `keys`: secret by name; `mock`: the engine can fail; `long`: tokens of a request that is not to end by itself.
    """

    def __init__(
        self, port: int, keys: dict[str, str], model: str, mock: bool, seed: int, long: int = LONG
    ) -> None:
        self.port, self.keys, self.model, self.mock, self.long = port, keys, model, mock, long
        self.random, self.expected = random.Random(seed), Expected()
        self.one_at_a_time = asyncio.Lock()
        self.kinds: dict[Callable[[], Awaitable[None]], int] = {
            self.whole: 20, self.stream: 20, self.one_connection: 4, self.compressed: 4, self.old_version: 2,
            self.declined_upgrade: 2, self.half_closed: 3, self.slow_body: 3, self.leaves_stream: 8,
            self.resets_stream: 6, self.leaves_whole: 6, self.leaves_body: 4, self.deadline_whole: 3,
            self.deadline_stream: 3, self.bad_body: 8, self.no_key: 4, self.no_model: 4, self.bomb: 2,
            self.too_large: 2, self.no_request: 4, self.idle: 2, self.endless_head: 1, self.no_place: 2,
            self.engine_refuses: 4, self.no_route: 2,
        }  # fmt: skip
        if mock:
            self.kinds[self.engine_raises] = 3

    async def one(self, kind: Callable[[], Awaitable[None]] | None = None) -> None:
        """A request of some kind, from its begin to its end."""
        if kind is None:
            (kind,) = self.random.choices(list(self.kinds), weights=list(self.kinds.values()))
        name = kind.__name__
        self.expected.requests += 1
        self.expected.kinds[name] += 1
        try:
            await kind()
        except Exception as error:
            self.expected.wrong.append(f"{name}: {type(error).__name__} {error}")

    # What is sent

    def document(self, tokens: int, **more: Any) -> dict[str, Any]:
        words = " ".join(
            str(self.random.randrange(1000)) for _ in range(self.random.randrange(1, MOST_WORDS))
        )
        message = {"role": "user", "content": words}
        return {
            "model": self.model, "messages": [message], "max_tokens": tokens, "ignore_eos": True, **more
        }  # fmt: skip

    def head(self, key: str, length: int | None, *more: str, path: str = CHAT, version: str = "1.1") -> bytes:
        lines = [
            f"POST {path} HTTP/{version}", "Host: a", f"Authorization: Bearer {self.keys.get(key, key)}",
            "Content-Type: application/json", *more,
        ]  # fmt: skip
        if length is not None:
            lines.append(f"Content-Length: {length}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    def request(self, key: str, document: Any, *more: str, close: bool = True, version: str = "1.1") -> bytes:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        return (
            self.head(key, len(body), *more, *(["Connection: close"] if close else []), version=version)
            + body
        )

    def tokens(self) -> int:
        return self.random.randrange(1, 40)

    @contextlib.asynccontextmanager
    async def connection(self) -> Any:
        connection = Connection(*await asyncio.open_connection("127.0.0.1", self.port))
        try:
            yield connection
        finally:
            connection.writer.close()

    async def answer(self, sent: bytes) -> bytes:
        async with self.connection() as connection:
            connection.send(sent)
            return await connection.end()

    # What ends well

    def well(self, found: bytes, tokens: int, streamed: bool = False) -> None:
        status(found, 200)
        if streamed and b"data: [DONE]" not in found:
            raise ValueError(f"a stream was cut: {found[-200:]!r}")
        self.expected.ended("ok")
        self.expected.whole_tokens += tokens

    async def whole(self) -> None:
        tokens = self.tokens()
        self.well(await self.answer(self.request("whole", self.document(tokens))), tokens)

    async def stream(self) -> None:
        tokens = self.tokens()
        sent = self.request("whole", self.document(tokens, stream=True))
        self.well(await self.answer(sent), tokens, streamed=True)

    async def one_connection(self) -> None:
        """Several requests, one after the other and pipelined."""
        tokens = [self.tokens() for _ in range(3)]
        sent = [self.request("whole", self.document(one), close=False) for one in tokens]
        get = f"Host: a\r\nAuthorization: Bearer {self.keys['whole']}\r\n"
        models = f"GET /v1/models HTTP/1.1\r\n{get}\r\n".encode()
        last = f"HEAD /livez HTTP/1.1\r\n{get}Connection: close\r\n\r\n".encode()
        found = await self.answer(b"".join([*sent, models, last]))
        if found.count(b"HTTP/1.1 200") != len(sent) + 2:
            raise ValueError(f"not every request of a connection was answered: {found[:300]!r}")
        for one in tokens:
            self.well(found, one)

    async def compressed(self) -> None:
        tokens = self.tokens()
        body = json.dumps(self.document(tokens)).encode()
        name, code = self.random.choice((("gzip", gzip.compress), ("zstd", zstd.compress)))
        self.well(await self.answer(self.request("whole", code(body), f"Content-Encoding: {name}")), tokens)

    async def old_version(self) -> None:
        tokens = self.tokens()
        sent = self.request("whole", self.document(tokens, stream=True), close=False, version="1.0")
        self.well(await self.answer(sent), tokens, streamed=True)

    async def declined_upgrade(self) -> None:
        tokens = self.tokens()
        offer = ("Connection: Upgrade, HTTP2-Settings, close", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQ")
        sent = self.request("whole", self.document(tokens), *offer, close=False)
        self.well(await self.answer(sent), tokens)

    async def half_closed(self) -> None:
        tokens = self.tokens()
        async with self.connection() as connection:
            connection.send(self.request("whole", self.document(tokens)))
            connection.writer.write_eof()
            found = await connection.end()
        while found.startswith(b"HTTP/1.1 100"):
            found = found.partition(b"\r\n\r\n")[2]
        self.well(found, tokens)

    async def slow_body(self) -> None:
        tokens = self.tokens()
        sent = self.request("whole", self.document(tokens))
        async with self.connection() as connection:
            for begin in range(0, len(sent), 60):
                connection.send(sent[begin : begin + 60])
                await asyncio.sleep(0.05)
            self.well(await connection.end(), tokens)

    # Clients that leave

    async def leaves_stream(self, reset: bool = False) -> None:
        async with self.connection() as connection:
            connection.send(self.request(self.churn, self.document(self.long, stream=True)))
            await connection.until(TOKEN)
            if reset:
                connection.reset()
        self.expected.ended("client_gone")

    async def resets_stream(self) -> None:
        await self.leaves_stream(reset=True)

    async def leaves_whole(self) -> None:
        async with self.connection() as connection:
            connection.send(self.request(self.churn, self.document(self.long)))
            await asyncio.sleep(self.random.uniform(0.1, 0.4))
            connection.reset()
        self.expected.ended("client_gone")

    async def leaves_body(self) -> None:
        async with self.connection() as connection:
            connection.send(self.head(self.churn, 10_000) + b'{"messages": [')
            await asyncio.sleep(0.3)
            if self.random.random() < 0.5:
                connection.reset()
        self.expected.rejected("incomplete")

    @property
    def churn(self) -> str:
        return "churn"

    # Deadlines

    async def deadline_whole(self) -> None:
        sent = self.request(self.churn, self.document(self.long), "X-Request-Timeout: 0.4")
        status(await self.answer(sent), 504)
        self.expected.ended("deadline")

    async def deadline_stream(self) -> None:
        sent = self.request(self.churn, self.document(self.long, stream=True), "X-Request-Timeout: 0.5")
        found = await self.answer(sent)
        if b"deadline_exceeded" not in found or b"[DONE]" in found:
            raise ValueError(f"a deadline ended with {found[-200:]!r}")
        self.expected.ended("deadline")

    # What is refused

    async def refused(self, sent: bytes, code: int, reason: str) -> None:
        status(await self.answer(sent), code)
        self.expected.rejected(reason)

    async def bad_body(self) -> None:
        body, code, reason = self.random.choice((
            (b'{"messages": [', 400, "json"), (b"[]", 400, "json"), (b"", 400, "json"),
            (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', 400, "unicode"),
            (b'{"messages": [], "max_tokens": 1000000}', 400, "max_tokens"), (b'{"a":' * 2000, 400, "json"),
        ))  # fmt: skip
        await self.refused(self.request(self.churn, body), code, reason)

    async def no_key(self) -> None:
        await self.refused(self.request(f"lb-{self.random.random()}", b"{}"), 401, "key")

    async def no_model(self) -> None:
        document = self.document(1) | {"model": f"none/{self.random.random()}"}
        await self.refused(self.request(self.churn, document), 404, "no_such_model")

    async def bomb(self) -> None:
        name, code = self.random.choice((("gzip", gzip.compress), ("zstd", zstd.compress)))
        sent = self.request(self.churn, code(bytes(3 << 20)), f"Content-Encoding: {name}")
        await self.refused(sent, 413, "body_size")

    async def too_large(self) -> None:
        await self.refused(self.head(self.churn, 1 << 30, "Connection: close"), 413, "body_size")

    async def no_request(self) -> None:
        sent = self.random.choice(
            (b"\x16\x03\x01\x00\xa5\x01\x00", b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n")
        )
        status(await self.answer(sent), 400)

    async def no_route(self) -> None:
        sent = self.head(self.churn, 2, "Connection: close", path=f"/v1/{self.random.random()}") + b"{}"
        status(await self.answer(sent), 404)

    async def no_place(self) -> None:
        """A key with one place: the second request of two is refused, and the third, after the first, is not."""
        async with self.one_at_a_time:
            async with self.connection() as connection:
                connection.send(self.request("one", self.document(self.long, stream=True)))
                await connection.until(TOKEN)
                await self.refused(self.request("one", self.document(1)), 429, "key_concurrent")
            self.expected.ended("client_gone")
            async with asyncio.timeout(FREE_S):
                while (found := await self.answer(self.request("one", self.document(1))))[9:12] == b"429":
                    self.expected.rejected("key_concurrent")
                    await asyncio.sleep(0.2)
            status(found, 200)
            self.expected.ended("ok")

    async def engine_refuses(self) -> None:
        more = {"seed": 1} if self.mock else {"temperature": -1}
        status(await self.answer(self.request(self.churn, self.document(1, **more))), 400)
        self.expected.ended("refused")

    async def engine_raises(self) -> None:
        status(await self.answer(self.request(self.churn, self.document(1, seed=2))), 500)
        self.expected.ended("error")

    # Connections that bring nothing

    async def idle(self) -> None:
        async with self.connection():
            await asyncio.sleep(2)

    async def endless_head(self) -> None:
        """The server ends it, in its own time."""
        async with self.connection() as connection:
            connection.send(b"GET /livez HTTP/1.1\r\n")
            async with asyncio.timeout(HEAD_S + 5):
                await connection.end()


def status(found: bytes, code: int) -> None:
    """ValueError where an answer has another status."""
    if found[9:12] != b"%d" % code:
        raise ValueError(f"{code} was due, {found[:300]!r} came")
