"""A recorded conversation, cut into the requests that made it: each assistant's message was the answer to one.

What is sent again is the server's own answers; but an answer that calls tools is carried as it was recorded, because
the results after it refer to its calls.
"""

from collections.abc import Sequence
from typing import Any

from lowbit_loadtest.generate.request import Message
from lowbit_loadtest.generate.traces.recorded import RecordedTurn, Row

ROLES = ("system", "developer", "user", "assistant", "tool")
PAUSES = (
    "think_s",
    "tool_s",
)  # ours, beside a user's or a tool's message: seconds since the answer before it


def turns_of(messages: Sequence[Message]) -> tuple[RecordedTurn, ...]:
    """One turn for each assistant's message; one in all where the last message is not the assistant's."""
    if messages[-1]["role"] != "assistant":
        return (_turn(messages, None),)
    turns: list[RecordedTurn] = []
    asked: list[Message] = []
    for message in messages:
        if message["role"] == "assistant" and any(one["role"] in ("user", "tool") for one in asked):
            turns.append(_turn(asked, message))
            asked = []
        else:  # a greeting, or a second message of the assistant: part of what is asked next
            asked.append(message)
    return tuple(turns) or (_turn(asked, None),)


def _turn(asked: Sequence[Message], answer: Message | None) -> RecordedTurn:
    pauses = [float(message[key]) for message in asked for key in PAUSES if message.get(key) is not None]
    return RecordedTurn(
        tuple(_without_pauses(message) for message in asked),
        answer=_without_pauses(answer) if answer else None,
        pause_s=max(pauses, default=None),
        after_tool=any(message["role"] == "tool" for message in asked),
    )


def _without_pauses(message: Message) -> Message:
    return {key: value for key, value in message.items() if key not in PAUSES}


def check_messages(row: Row, name: str, value: Any) -> list[Message]:
    """The messages under a key; raises ConfigError naming the first that a server could not read."""
    if not isinstance(value, list) or not value:
        raise row.error(name, "allowed is a list of one or more messages")
    for position, message in enumerate(value):
        if problem := _problem(message):
            raise row.error(f"{name}.{position}{problem[0]}", problem[1])
    return value


def _problem(message: Any) -> tuple[str, str] | None:
    """The part of a message that is wrong, and what is allowed there."""
    if not isinstance(message, dict):
        return "", "allowed is a message such as {role: user, content: text}"
    if (role := message.get("role")) not in ROLES:
        return ".role", f"{role!r} is given; allowed is {', '.join(ROLES)}"
    for pause in PAUSES:
        if not _is_pause(message.get(pause)):
            return f".{pause}", f"{message[pause]!r} is given; allowed is a number of seconds, 0 or more"
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        return ".tool_call_id", "a tool's result names the call that it answers; give its id"
    return _problem_of_content(message.get("content"), may_be_none=bool(message.get("tool_calls")))


def _problem_of_content(content: Any, may_be_none: bool) -> tuple[str, str] | None:
    if isinstance(content, str) or (content is None and may_be_none):
        return None
    if not isinstance(content, list) or not content:
        return ".content", "allowed is text or a list of parts; null only beside tool_calls"
    for position, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            return f".content.{position}", "allowed is a part such as {type: text, text: …}"
    return None


def _is_pause(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (number and 0 <= value < 86_400)
