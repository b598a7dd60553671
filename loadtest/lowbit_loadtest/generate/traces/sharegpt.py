"""ShareGPT: conversations of a person and a model, without times; a JSON array, or an object a line.

`{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}`. What a model said before the
first question is left out, and so is a last question that was not answered.
"""

from typing import Any

from lowbit_core.text_file import quote
from lowbit_loadtest.generate.request import Message
from lowbit_loadtest.generate.traces.messages import turns_of
from lowbit_loadtest.generate.traces.recorded import Format, RecordedSession, Row

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "assistant": "assistant", "model": "assistant", "system": "system",
}  # fmt: skip
KEY = "conversations"


def _session(row: Row) -> RecordedSession:
    said = row.get(KEY)
    if not isinstance(said, list):
        raise row.error(KEY, "allowed is a list of {from: human, value: text} and {from: gpt, value: text}")
    messages = _from_the_first_question([_message(row, index, one) for index, one in enumerate(said)])
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return RecordedSession(turns_of(messages) if messages else ())


def _message(row: Row, index: int, said: Any) -> Message:
    who, text = (
        (said.get("from", said.get("role")), said.get("value", said.get("content")))
        if isinstance(said, dict)
        else (None, None)
    )
    if not isinstance(who, str) or who not in ROLES:
        raise row.error(f"{KEY}.{index}.from", f"{quote(str(who))} is given; allowed is {', '.join(ROLES)}")
    if not isinstance(text, str):
        raise row.error(f"{KEY}.{index}.value", "allowed is text")
    return {"role": ROLES[who], "content": text}


def _from_the_first_question(messages: list[Message]) -> list[Message]:
    asked = next((index for index, one in enumerate(messages) if one["role"] == "user"), len(messages))
    return [one for one in messages[:asked] if one["role"] == "system"] + messages[asked:]


FORMAT = Format("sharegpt", (KEY,), _session)
