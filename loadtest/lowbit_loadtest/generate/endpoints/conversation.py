"""Messages, which are kept as OpenAI's chat takes them, read by the APIs that take another form."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from lowbit_loadtest.generate.request import Message

SYSTEM_ROLES = ("system", "developer")


def content_text(content: Any) -> str:
    """The words of a message's content: a text, or the text parts of a list."""
    if isinstance(content, str):
        return content
    return "".join(parts_text(content)) if isinstance(content, list) else ""


def parts_text(parts: Sequence[Any]) -> Iterator[str]:
    """The text of each part that has one."""
    for part in parts:
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            yield part["text"]


def as_prompt(messages: Sequence[Message]) -> str:
    """The conversation as one text, for APIs without roles."""
    return "\n".join(content_text(message.get("content")) for message in messages)


def without_system(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """The system messages' text, and the other messages."""
    system = [content_text(one.get("content")) for one in messages if one.get("role") in SYSTEM_ROLES]
    return "\n".join(system), [one for one in messages if one.get("role") not in SYSTEM_ROLES]


def calls_of(message: Message) -> Iterator[tuple[str, str, str]]:
    """Each tool call of an assistant's message: its id, name and arguments."""
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        yield str(call.get("id", "")), str(function.get("name", "")), str(function.get("arguments") or "{}")


def arguments_of(text: str) -> Any:
    """A call's arguments as an object."""
    try:
        return json.loads(text)
    except ValueError:
        return {"text": text}
