"""What one event of an answer says, whatever API it comes from; usage and errors as servers write them."""

import json
from dataclasses import dataclass
from typing import Any

DETAIL_CHARACTERS = 200


@dataclass(frozen=True)
class Usage:
    """Tokens by the server's count; None for what it does not say, or says in no number.

    `reasoning_apart`: its output tokens do not contain the reasoning tokens (Gemini, Grok), as OpenAI's do.
    """

    prompt_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_apart: bool = False


@dataclass(slots=True)
class Piece:
    """An event of a stream, or a whole answer. `other` is output that is no text: tool calls, a refusal, vectors."""

    text: str = ""
    reasoning: str = ""
    other: str = ""
    usage: Usage | None = None
    finish_reason: str | None = None
    error: str | None = None
    done: bool = False

    @property
    def has_output(self) -> bool:
        return bool(self.text or self.reasoning or self.other)

    @property
    def says_nothing(self) -> bool:
        return not (self.has_output or self.usage or self.finish_reason or self.done)


def read_usage(usage: Any) -> Usage | None:
    """OpenAI's usage by its names of both APIs; None where there is none."""
    if not isinstance(usage, dict) or not usage:
        return None
    prompt = _first(usage, "prompt_tokens", "input_tokens")
    output = _first(usage, "completion_tokens", "output_tokens")
    total = _count(usage.get("total_tokens"))
    reasoning = _detail(usage, ("completion_tokens_details", "output_tokens_details"), "reasoning_tokens")
    if reasoning is None:
        reasoning = _count(usage.get("reasoning_tokens"))
    if total is not None and total > (prompt or output or 0):
        if output is None and prompt is not None:
            output = total - prompt
        elif prompt is None and output is not None:
            prompt = total - output
    apart = bool(reasoning) and output is not None and _is_apart(prompt, output, reasoning or 0, total)
    cached = _detail(usage, ("prompt_tokens_details", "input_tokens_details"), "cached_tokens")
    return Usage(prompt, output, reasoning, cached, apart)


def _is_apart(prompt: int | None, output: int, reasoning: int, total: int | None) -> bool:
    return reasoning > output or (prompt is not None and total == prompt + output + reasoning)


def _first(usage: dict[str, Any], *names: str) -> int | None:
    counts = (_count(usage.get(name)) for name in names)
    return next((count for count in counts if count is not None), None)


def _detail(usage: dict[str, Any], objects: tuple[str, ...], name: str) -> int | None:
    inside = next((found for one in objects if isinstance(found := usage.get(one), dict)), {})
    return _count(inside.get(name))


def _count(value: Any) -> int | None:
    """A number of tokens; some servers write it as text or as 5.0."""
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value != value // 1:
        return None
    return int(value)


def finish_of(reason: Any) -> str | None:
    """Why an answer ended; some servers write "null" or "" while it has not."""
    return str(reason) if reason and reason not in ("null", "None") else None


def error_of(event: dict[str, Any]) -> str | None:
    """The message of an event that is an error: OpenAI's `error`, unless null or empty, or vLLM's and Anthropic's."""
    error = event.get("error")
    if error:
        return one_line(_message(event if isinstance(error, bool | int) else error))
    if event.get("object") == "error" or event.get("type") == "error":
        return one_line(_message(event))
    return None


def error_message(text: str) -> str:
    """The message of an error body, or the body itself, on one line."""
    try:
        body = json.loads(text)
    except ValueError:
        return one_line(text)
    if isinstance(body, list) and len(body) == 1:  # Gemini
        body = body[0]
    if not isinstance(body, dict):
        return one_line(text)
    return error_of(body) or one_line(_message(body))


def _message(error: Any) -> str:
    """The words of an error object: `message`, or FastAPI's `detail`, or all of it."""
    if not isinstance(error, dict):
        return str(error)
    for name in ("message", "detail", "error"):
        if isinstance(said := error.get(name), str) and said:
            return said
    return json.dumps(error, ensure_ascii=False)


def one_line(text: str) -> str:
    return " ".join(text.split())[:DETAIL_CHARACTERS]
