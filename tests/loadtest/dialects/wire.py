"""An answer as bytes: events, frames and whole bodies, and what a dialect says of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowbit_loadtest.generate.answer import NOT_STREAMED
from lowbit_loadtest.generate.records import Outcome

COMPLETED, FAILED, CUT_OFF, REJECTED = Outcome.COMPLETED, Outcome.FAILED, Outcome.CUT_OFF, Outcome.REJECTED
N = 5
PROMPT = 7
USAGE: dict[str, Any] = {"prompt_tokens": PROMPT, "completion_tokens": N, "total_tokens": PROMPT + N}
TYPE = "text/event-stream"
Events = Sequence[Any]


@dataclass(frozen=True)
class Dialect:
    """An answer as bytes, and what it is. `tokens` are prompt and output as the server counts them; `sent` those of the
    output that were to be seen, `chunks` the pieces in which they came,
            `answer_at` the first that is no reasoning."""

    name: str
    raw: bytes
    outcome: Outcome = COMPLETED
    tokens: tuple[int | None, int | None] = (PROMPT, N)
    chunks: int = N
    sent: int | None = N
    answer_at: int | None = 0
    detail: str = ""
    notes: tuple[str, ...] = ()
    endpoint: str = "chat"
    lenient: bool = False
    closes: bool = False
    body: tuple[str, ...] = field(default=())  # --body


def chunk(delta: Any = None, finish: str | None = None, **extra: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": {} if delta is None else delta, "finish_reason": finish}
    return {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [choice],
        **extra,
    }


def usage_event(**changes: Any) -> dict[str, Any]:
    return {**chunk(), "choices": [], "usage": {**USAGE, **changes}}


def http(body: bytes, status: int = 200, kind: str = TYPE, headers: str = "", chunked: bool = True) -> bytes:
    framing = "transfer-encoding: chunked" if chunked else f"content-length: {len(body)}"
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\n{framing}\r\n{headers}\r\n".encode()
    return head + (
        b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        if chunked and body
        else b"0\r\n\r\n"
        if chunked
        else body
    )


def whole(value: Any, status: int = 200, kind: str = "application/json") -> bytes:
    return http(json.dumps(value).encode(), status, kind, chunked=False)


def lines(events: Events, prefix: str = "data: ", end: str = "\n\n") -> bytes:
    """Events as a server writes them."""
    texts = (event if isinstance(event, str) else json.dumps(event) for event in events)
    return "".join(f"{prefix}{text}{end}" for text in texts).encode()


def typed(*events: Mapping[str, Any]) -> bytes:
    """Events with their names before them, as the APIs of types write them."""
    return http("".join(f"event: {one['type']}\ndata: {json.dumps(one)}\n\n" for one in events).encode())


ROLE = chunk({"role": "assistant", "content": ""})
WORDS = [chunk({"content": f"w{i} "}) for i in range(N)]
STOP, USED, DONE = chunk({}, "stop"), usage_event(), "[DONE]"
NORMAL: list[Any] = [ROLE, *WORDS, STOP, USED, DONE]


def plain(events: Events) -> bytes:
    return http(lines(events))


def with_usage(**usage: Any) -> bytes:
    return plain([ROLE, *WORDS, STOP, {**USED, "usage": usage}, DONE])


def each(change: Callable[[dict[str, Any]], dict[str, Any]]) -> bytes:
    return plain([change(event) if isinstance(event, dict) else event for event in NORMAL])


def _finish_empty(event: dict[str, Any]) -> dict[str, Any]:
    return {
        **event,
        "choices": [{**one, "finish_reason": one["finish_reason"] or ""} for one in event["choices"]],
    }


def framed(chunk_bytes: int, body: bytes = lines(NORMAL)) -> bytes:
    """The body in HTTP chunks of that size."""
    pieces = [body[start : start + chunk_bytes] for start in range(0, len(body), chunk_bytes)]
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: Chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in pieces) + b"0\r\n\r\n"


MESSAGE = {"role": "assistant", "content": "hello there"}
ANSWER = {
    "object": "chat.completion",
    "choices": [{"index": 0, "message": MESSAGE, "finish_reason": "stop"}],
    "usage": USAGE,
}
THOUGHT = {"completion_tokens_details": {"reasoning_tokens": 100}}
OVERLOADED = {"message": "model overloaded", "type": "server_error", "code": 500}
NO_USAGE: dict[str, Any] = {"tokens": (None, None), "sent": None}
NOT_STREAMED_ANSWER: dict[str, Any] = {"chunks": 0, "answer_at": None, "notes": (NOT_STREAMED,)}
NOTHING: dict[str, Any] = {"tokens": (None, None), "sent": None, "chunks": 0, "answer_at": None}
BROKEN: dict[str, Any] = {"outcome": FAILED, "tokens": (None, None), "sent": None}
