"""`/v1/chat/completions`, as OpenAI has it and as others write it."""

import json
from collections.abc import Sequence
from typing import Any

from lowbit_loadtest.generate.endpoints.conversation import parts_text
from lowbit_loadtest.generate.endpoints.piece import Piece, finish_of, read_usage
from lowbit_loadtest.generate.request import Request

name = "chat"
path = "chat/completions"
limit_keys: Sequence[str] = ("max_completion_tokens", "max_tokens")
streams = True
has_template = True
takes_json = True
takes_tools = True
can_be_exact = True
last_mark = "[DONE]"
finish_key = "finish_reason"
key_header: str | None = None
headers: dict[str, str] = {}
REASONING = ("reasoning_content", "reasoning")
OTHER = ("refusal", "audio", "function_call")


def body(request: Request, model: str) -> dict[str, Any]:
    extra: dict[str, Any] = {"ignore_eos": True} if request.exact else {}
    if request.response_format is not None:
        extra["response_format"] = request.response_format
    if request.tools:
        extra["tools"] = list(request.tools)
    return {
        "model": model,
        "messages": list(request.messages),
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "seed": request.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
        **extra,
    }


def read(event: dict[str, Any]) -> Piece:
    """A chunk, or a whole answer, whose choices have `message` in place of `delta`."""
    piece = Piece()
    usage = event.get("usage")
    for choice in event.get("choices") or ():
        delta = choice["delta"] if "delta" in choice else choice.get("message")
        _read_delta(delta or choice, piece)
        if reason := choice.get("finish_reason"):
            piece.finish_reason = finish_of(reason)
        usage = usage or choice.get("usage")  # Moonshot
    usage = usage or (event.get("x_groq") or {}).get("usage")
    if usage:
        piece.usage = read_usage(usage)
    return piece


def _read_delta(delta: dict[str, Any], piece: Piece) -> None:
    if content := delta.get("content") or delta.get("text"):
        if isinstance(content, str):
            piece.text += content
        else:
            _read_parts(content, piece)
    if len(delta) == 1 and content:  # most chunks
        return
    for key in REASONING:
        if said := delta.get(key):
            piece.reasoning += said if isinstance(said, str) else json.dumps(said)
            break  # vLLM and OpenRouter write it under both names
    for call in delta.get("tool_calls") or ():
        function = call.get("function") or {}
        piece.other += f"{function.get('name') or ''}{function.get('arguments') or ''}" or " "
    for key in OTHER:
        if said := delta.get(key):
            piece.other += said if isinstance(said, str) else json.dumps(said)


def _read_parts(parts: Sequence[Any], piece: Piece) -> None:
    """Content in parts, where Mistral's have what was thought among them."""
    for part in parts:
        thought = part.get("thinking") if isinstance(part, dict) else None
        if thought:
            piece.reasoning += thought if isinstance(thought, str) else "".join(parts_text(thought))
        else:
            piece.text += "".join(parts_text([part]))
