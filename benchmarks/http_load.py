"""A small HTTP client that measures: one connection a request, written once, timed by the monotonic clock.

It exists because a full client costs as much CPU as the gateway that it is to measure, on the same two cores.
"""

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

CHUNK = b"\n\ndata: "


@dataclass(frozen=True)
class Answer:
    """One request: `status` 0 when the connection broke. Times in seconds from the first byte sent."""

    status: int
    seconds: float
    first_token_s: float | None
    events: int
    done: bool


async def post(url: str, body: dict[str, Any], headers: dict[str, str]) -> Answer:
    """Send one request and read its answer to the end; events of a stream are counted as they arrive."""
    parts = urlsplit(url)
    data = json.dumps(body).encode()
    head = {"host": parts.netloc, "content-type": "application/json", "connection": "close", **headers}
    lines = [
        f"POST {parts.path} HTTP/1.1",
        *(f"{n}: {v}" for n, v in head.items()),
        f"content-length: {len(data)}",
    ]
    began = time.monotonic()
    try:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
        answer = await _read(reader, began)
        writer.close()
    except OSError:
        return Answer(0, time.monotonic() - began, None, 0, done=False)
    return answer


async def _read(reader: asyncio.StreamReader, began: float) -> Answer:
    status, events, first, tail = 0, 0, None, b""
    while part := await reader.read(1 << 16):
        if not status:
            status = int(part[9:12])
        found = part.count(b'"content":"') - part.count(b'"content":""')
        if found and first is None:
            first = time.monotonic() - began
        events += found
        tail = (tail + part)[-64:]
    return Answer(status, time.monotonic() - began, first, events, done=b"data: [DONE]" in tail)


def quantile(values: list[float], share: float) -> float:
    """The value that `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
