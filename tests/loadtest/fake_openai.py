"""A stand-in for an OpenAI server: known delays, scripted faults, no model. Not a server to learn from.

It runs in a process of its own (`python fake_openai.py`), because in the tester's process both would wait for one
interpreter, on asyncio's streams and nothing else. What a request gets is decided by its `seed`: `seed % len(plan)`
picks the reply, so that several connections need no order. `/written` has the moment at which each content chunk was
written, on the machine's monotonic clock: the tests compare what the tester says with what really happened.
"""

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Reply:
    """How one chat request is answered. Times in seconds; `fault` ends the answer after `chunks` chunks."""

    ttft_s: float = 0.02
    gap_s: float = 0.01
    chunks: int = 5
    tokens_per_chunk: int = 1
    usage_tokens: int | None = None  # what usage claims; None: the truth
    continuous_usage: bool = False
    fault: str = (
        ""  # reset | broken_sse | no_done | endless | firehose | status_429 | status_500 | error_event
    )


@dataclass
class Fake:
    """The server's state; `stall` is a span of seconds after the first request in which nothing is answered."""

    plan: list[Reply]
    stall: tuple[float, float] | None = None
    metrics: bool = True
    tokenize: bool = True
    first_s: float | None = None
    generated: int = 0
    prompted: int = 0
    one_at_a_time: bool = False
    bodies: list[dict[str, Any]] = field(default_factory=list)
    written: dict[int, list[float]] = field(default_factory=dict)  # by seed: when its chunks were written
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._answer_one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = head.split("\r\n")
        path = lines[0].split()[1]
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if path == "/v1/chat/completions":
            if not self.one_at_a_time:
                return await self._chat(json.loads(body), writer)
            async with self.busy:
                return await self._chat(json.loads(body), writer)
        status, answer = self._small(path, body)
        writer.write(_response(status, answer))
        await writer.drain()
        return True

    def _small(self, path: str, body: bytes) -> tuple[int, bytes]:
        if path == "/v1/models":
            return 200, b'{"data": [{"id": "fake-model"}]}'
        if path == "/bodies":
            return 200, json.dumps(self.bodies).encode()
        if path == "/written":
            return 200, json.dumps(self.written).encode()
        if path == "/metrics" and self.metrics:
            counts = {"prompt": self.prompted, "generation": self.generated}
            return 200, "".join(f"vllm:{name}_tokens_total {n}\n" for name, n in counts.items()).encode()
        if path == "/tokenize" and self.tokenize:
            return 200, json.dumps({"count": _count(json.loads(body)["messages"])}).encode()
        return 404, b"{}"

    async def _chat(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        arrived_s = time.monotonic()
        self.first_s = self.first_s or arrived_s
        self.bodies.append(request)
        key = _key(request)
        reply = self.plan[key % len(self.plan)]
        if reply.fault.startswith("status_"):
            writer.write(_response(int(reply.fault[7:]), b'{"error": {"message": "as scripted"}}'))
            await writer.drain()
            return True
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        _send(writer, _chunk({"role": "assistant", "content": ""}))
        due_s = max(arrived_s, self._end_of_stall(arrived_s)) + reply.ttft_s
        tokens = 0
        for index in range(reply.chunks if reply.fault not in ("endless", "firehose") else 10**9):
            if index == 0 or reply.fault != "firehose":
                await _sleep_until(due_s + index * reply.gap_s)
            tokens += reply.tokens_per_chunk
            event = _chunk({"content": f"w{index} "})
            self.written.setdefault(key, []).append(time.monotonic())
            if reply.continuous_usage:
                event["usage"] = _usage(request, tokens)
            _send(writer, event)
            if index % 64 == 63:
                await writer.drain()
        self.generated += tokens
        self.prompted += _count(request["messages"])
        return await self._end(request, reply, tokens, writer)

    async def _end(
        self, request: dict[str, Any], reply: Reply, tokens: int, writer: asyncio.StreamWriter
    ) -> bool:
        if reply.fault == "reset":
            await writer.drain()
            writer.transport.abort()
            return False
        if reply.fault == "broken_sse":
            _send_raw(writer, b'data: {"choices": [{"del\n\n')
        if reply.fault == "error_event":
            _send_raw(writer, b'data: {"error": {"message": "as scripted"}}\n\n')
        _send(writer, _chunk({}, "stop"))
        claimed = tokens if reply.usage_tokens is None else reply.usage_tokens
        _send(writer, {"choices": [], "usage": _usage(request, claimed)})
        if reply.fault != "no_done":
            _send_raw(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    def _end_of_stall(self, now_s: float) -> float:
        if self.stall is None or self.first_s is None:
            return now_s
        begin_s, end_s = (self.first_s + offset_s for offset_s in self.stall)
        return end_s if begin_s <= now_s < end_s else now_s


async def _sleep_until(due_s: float) -> None:
    if (left_s := due_s - time.monotonic()) > 0.0015:
        await asyncio.sleep(left_s - 0.0015)
    while time.monotonic() < due_s:
        await asyncio.sleep(0)


def _key(request: dict[str, Any]) -> int:
    """The seed; of a client that sends none, the number at the end of its prompt."""
    if "seed" in request:
        return int(request["seed"])
    words = _text(request["messages"][-1]).split()
    return int(words[-1]) if words and words[-1].isdigit() else 0


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)


def _count(messages: list[dict[str, Any]]) -> int:
    """Words, and a template of 3 tokens a message and 2 at the end."""
    return sum(len(_text(message).split()) + 3 for message in messages) + 2


def _usage(request: dict[str, Any], tokens: int) -> dict[str, int]:
    return {"prompt_tokens": _count(request["messages"]), "completion_tokens": tokens}


def _chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"object": "chat.completion.chunk", "choices": [{"delta": delta, "finish_reason": finish_reason}]}


def _send(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    _send_raw(writer, f"data: {json.dumps(event)}\n\n".encode())


def _send_raw(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


def _response(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
        status,
        len(body),
        body,
    )


async def serve(settings: dict[str, Any]) -> None:
    """Serve until killed; prints the port."""
    fake = Fake(**{**settings, "plan": [Reply(**reply) for reply in settings["plan"]]})
    server = await asyncio.start_server(fake.handle, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


def settings_of(plan: list[Reply], **settings: Any) -> str:
    """The argument of the process."""
    return json.dumps({"plan": [asdict(reply) for reply in plan], **settings})


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
