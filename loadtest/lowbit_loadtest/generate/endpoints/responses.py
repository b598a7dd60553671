"""`/v1/responses`: OpenAI's newer API, whose events have types, and whose last one has the whole response."""

from collections.abc import Iterator, Sequence
from typing import Any

from lowbit_loadtest.generate.endpoints.conversation import calls_of, content_text
from lowbit_loadtest.generate.endpoints.piece import Piece, error_of, one_line, read_usage
from lowbit_loadtest.generate.request import Message, Request

name = "responses"
path = "responses"
limit_keys: Sequence[str] = ("max_output_tokens",)
streams = True
has_template = True
takes_json = True
takes_tools = True
can_be_exact = True
last_mark = "response.completed"
finish_key = "status"
key_header: str | None = None
headers: dict[str, str] = {}
TEXT = ("response.output_text.delta",)
REASONING = ("response.reasoning_text.delta",)
UNCOUNTED = ("response.reasoning_summary_text.delta",)  # usage has the tokens of what it sums up
ENDS = ("response.completed", "response.incomplete", "response.failed", "response.cancelled")


def body(request: Request, model: str) -> dict[str, Any]:
    """It has no seed."""
    extra: dict[str, Any] = {"ignore_eos": True} if request.exact else {}
    if request.response_format is not None:
        extra["text"] = {"format": {"type": "json_schema", **request.response_format["json_schema"]}}
    if request.tools:
        extra["tools"] = [{"type": "function", **one["function"]} for one in request.tools]
    return {
        "model": model,
        "input": [item for message in request.messages for item in _items(message)],
        "max_output_tokens": request.max_tokens,
        "temperature": request.temperature,
        "stream": True,
        "store": False,
        **extra,
    }


def _items(message: Message) -> Iterator[dict[str, Any]]:
    if message["role"] == "tool":
        output = content_text(message.get("content"))
        yield {"type": "function_call_output", "call_id": message.get("tool_call_id", ""), "output": output}
        return
    if content := message.get("content"):
        yield {"role": message["role"], "content": _content(message["role"], content)}
    for call_id, called, arguments in calls_of(message):
        yield {"type": "function_call", "call_id": call_id, "name": called, "arguments": arguments}


def _content(role: str, content: Any) -> Any:
    if not isinstance(content, list):
        return content
    kind = "output_text" if role == "assistant" else "input_text"
    return [_part(part, kind) for part in content]


def _part(part: dict[str, Any], kind: str) -> dict[str, Any]:
    if part.get("type") == "image_url":
        return {"type": "input_image", "image_url": part["image_url"]["url"]}
    return {**part, "type": kind} if part.get("type") == "text" else part


def read(event: dict[str, Any]) -> Piece:
    """An event, or a whole answer, which is the response itself."""
    kind = event.get("type", "")
    if kind in TEXT:
        return Piece(text=event["delta"])
    if kind in REASONING:
        return Piece(reasoning=event["delta"])
    if kind.endswith(".delta") and kind not in UNCOUNTED:  # a refusal, a call's arguments, …
        return Piece(other=event["delta"])
    if kind in ENDS:
        return _read_end(event["response"])
    if event.get("object") == "response":
        piece = _read_end(event)
        for item in event.get("output") or ():
            _read_item(item, piece)
        return piece
    return Piece()


def _read_end(response: dict[str, Any]) -> Piece:
    status = str(response.get("status") or "completed")
    why = (response.get("incomplete_details") or {}).get("reason")
    error = error_of(response) if status != "cancelled" else one_line("the server cancelled it")
    if status == "failed" and error is None:
        error = "status failed"
    usage = read_usage(response.get("usage"))
    return Piece(usage=usage, finish_reason=str(why or status), error=error, done=True)


def _read_item(item: dict[str, Any], piece: Piece) -> None:
    said = content_text(item.get("content"))
    if item.get("type") == "reasoning":
        piece.reasoning += said
    else:
        piece.text += said
        piece.other += str(item.get("arguments") or "")
