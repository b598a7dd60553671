"""`/v1/messages`: Anthropic's API. Its usage comes in two parts, and what is cached is not among its input tokens."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lowbit_loadtest.generate.endpoints.conversation import (
    arguments_of,
    calls_of,
    content_text,
    without_system,
)
from lowbit_loadtest.generate.endpoints.piece import Piece, Usage, read_usage
from lowbit_loadtest.generate.request import Message, Request

name = "messages"
path = "messages"
limit_keys: Sequence[str] = ("max_tokens",)
streams = True
has_template = True
takes_json = False
takes_tools = True
can_be_exact = False
last_mark = "message_stop"
finish_key = "stop_reason"
key_header: str | None = "x-api-key"
headers = {"anthropic-version": "2023-06-01"}
CACHED = ("cache_read_input_tokens", "cache_creation_input_tokens")


def body(request: Request, model: str) -> dict[str, Any]:
    """It has no seed and no way to ask for an exact length."""
    system, others = without_system(request.messages)
    extra: dict[str, Any] = {"system": system} if system else {}
    if request.tools:
        extra["tools"] = [_tool(one["function"]) for one in request.tools]
    return {
        "model": model,
        "messages": [_message(one) for one in others],
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "stream": True,
        **extra,
    }


def _tool(function: dict[str, Any]) -> dict[str, Any]:
    said = {"description": function["description"]} if function.get("description") else {}
    return {
        "name": function["name"],
        **said,
        "input_schema": function.get("parameters") or {"type": "object"},
    }


def _message(message: Message) -> Message:
    content = message.get("content")
    if message["role"] == "tool":
        block = {
            "type": "tool_result",
            "tool_use_id": message.get("tool_call_id", ""),
            "content": content_text(content),
        }
        return {"role": "user", "content": [block]}
    calls = [
        {"type": "tool_use", "id": call_id, "name": called, "input": arguments_of(arguments)}
        for call_id, called, arguments in calls_of(message)
    ]
    if not calls and isinstance(content, str):
        return {"role": message["role"], "content": content}
    parts = [{"type": "text", "text": content}] if isinstance(content, str) and content else content or []
    return {"role": message["role"], "content": [*(_part(part) for part in parts), *calls]}


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part.get("type") != "image_url":
        return part
    url = str(part["image_url"]["url"])
    if not url.startswith("data:"):
        return {"type": "image", "source": {"type": "url", "url": url}}
    kind, _, data = url.removeprefix("data:").partition(";base64,")
    return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}}


def read(event: dict[str, Any]) -> Piece:
    """An event, or a whole answer, which is the message itself."""
    kind = event.get("type", "")
    if kind == "content_block_delta":
        return _read_delta(event["delta"])
    if kind == "content_block_start":
        return _read_block(event["content_block"])
    if kind == "message_start":
        begun = _usage(event["message"].get("usage"))  # its output tokens are a beginning, not a count
        return Piece(usage=replace(begun, output_tokens=None) if begun is not None else None)
    if kind == "message_delta":
        reason = event["delta"].get("stop_reason")
        return Piece(usage=_usage(event.get("usage")), finish_reason=str(reason) if reason else None)
    if kind == "message_stop":
        return Piece(done=True)
    return _read_whole(event) if kind == "message" else Piece()


def _read_delta(delta: dict[str, Any]) -> Piece:
    return Piece(
        text=delta.get("text") or "",
        reasoning=delta.get("thinking") or "",
        other=delta.get("partial_json") or "",
    )


def _read_block(block: dict[str, Any]) -> Piece:
    """The start of a block is empty, or a tool's name; in a whole answer, all of it."""
    called = str(block.get("name") or "") + (json.dumps(block["input"]) if block.get("input") else "")
    return Piece(text=block.get("text") or "", reasoning=block.get("thinking") or "", other=called)


def _read_whole(event: dict[str, Any]) -> Piece:
    blocks = [_read_block(block) for block in event.get("content") or ()]
    return Piece(
        text="".join(one.text for one in blocks),
        reasoning="".join(one.reasoning for one in blocks),
        other="".join(one.other for one in blocks),
        usage=_usage(event.get("usage")),
        finish_reason=event.get("stop_reason"),
        done=True,
    )


def _usage(usage: Any) -> Usage | None:
    """All of the prompt: Anthropic's total is input_tokens and what was read from and written to the cache."""
    said = read_usage(usage)
    if said is None:
        return None
    cached = [int(usage.get(key) or 0) for key in CACHED]
    prompt = None if said.prompt_tokens is None else said.prompt_tokens + sum(cached)
    read = cached[0] if usage.get(CACHED[0]) is not None else None
    return Usage(prompt, said.output_tokens, said.reasoning_tokens, read)
