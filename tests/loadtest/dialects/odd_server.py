"""Plays dialects: the request's first path element says which. It notes what it was sent, and knows nothing else."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tests.loadtest.dialects.wire import Dialect

Found = TypeVar("Found")


@dataclass
class OddServer:
    """`answers` are the raw bytes of an answer by the path they are asked at; others get 404."""

    answers: dict[str, bytes]
    closes: frozenset[str] = frozenset()
    url: str = ""
    bodies: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._answer_one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client is gone, or the test is over
        finally:
            writer.close()

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        first, *rest = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        named = (line.split(": ", 1) for line in rest if line)
        headers = {name.lower(): value for name, value in named}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        target = first.split()[1]
        path = target.partition("?")[0]
        self.targets.append(target)
        self.headers.append(headers)
        if body:
            self.bodies.append((path, json.loads(body)))
        key = next((one for one in self.answers if path == one or path.startswith(f"{one}/")), None)
        missing = b'HTTP/1.1 404 X\r\ncontent-length: 23\r\n\r\n{"detail": "Not Found"}'
        writer.write(self.answers[key] if key is not None else missing)
        await writer.drain()
        return key not in self.closes


def play(dialects: Sequence[Dialect]) -> OddServer:
    """A server that plays each at /N, its place in the table."""
    return OddServer(
        {f"/{number}": one.raw for number, one in enumerate(dialects)},
        frozenset(f"/{number}" for number, one in enumerate(dialects) if one.closes),
    )


def asked(server: OddServer, ask: Callable[[], Awaitable[Found]]) -> Found:
    """Run `ask` while the server lives, in one event loop."""

    async def run() -> Found:
        listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        async with listener:
            return await ask()

    return asyncio.run(run())
