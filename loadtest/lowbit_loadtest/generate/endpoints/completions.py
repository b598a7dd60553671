"""`/v1/completions`: a text that is continued."""

from collections.abc import Sequence
from typing import Any

from lowbit_loadtest.generate.endpoints.conversation import as_prompt
from lowbit_loadtest.generate.endpoints.piece import Piece, finish_of, read_usage
from lowbit_loadtest.generate.request import Request

name = "completions"
path = "completions"
limit_keys: Sequence[str] = ("max_tokens",)
streams = True
has_template = False
takes_json = True
takes_tools = False
can_be_exact = True
last_mark = "[DONE]"
finish_key = "finish_reason"
key_header: str | None = None
headers: dict[str, str] = {}


def body(request: Request, model: str) -> dict[str, Any]:
    extra: dict[str, Any] = {"ignore_eos": True} if request.exact else {}
    if request.response_format is not None:
        extra["response_format"] = request.response_format
    return {
        "model": model,
        "prompt": as_prompt(request.messages),
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "seed": request.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
        **extra,
    }


def read(event: dict[str, Any]) -> Piece:
    """A chunk, or a whole answer: they have the same form."""
    piece = Piece()
    for choice in event.get("choices") or ():
        piece.text += choice.get("text") or ""
        piece.reasoning += choice.get("reasoning") or ""
        if reason := choice.get("finish_reason"):
            piece.finish_reason = finish_of(reason)
    if usage := event.get("usage"):
        piece.usage = read_usage(usage)
    return piece
