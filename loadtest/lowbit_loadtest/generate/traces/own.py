"""Lowbit's own lines, and OpenAI's messages: one prompt, conversation or pair of lengths an object.

`{"prompt": "…"}`, `{"turns": ["…", "…"]}`, `{"messages": […], "tools": […]}` or
`{"prompt_tokens": 80, "output_tokens": 20}`, each with `at_s` where it has a time and `output_tokens` where its last
answer has a length. Unknown keys are refused; `format: openai` reads `messages` and `tools` of data sets whose lines
carry other things.
"""

from typing import Any

from lowbit_core.errors import ConfigError
from lowbit_core.names import did_you_mean
from lowbit_loadtest.generate.request import Message
from lowbit_loadtest.generate.traces.messages import check_messages, turns_of
from lowbit_loadtest.generate.traces.recorded import Format, RecordedSession, RecordedTurn, Row

ASKED = ("prompt", "messages", "turns", "prompt_tokens")
ALLOWED = (*ASKED, "output_tokens", "tools", "at_s", "id")


def _session(row: Row) -> RecordedSession:
    if unknown := [key for key in row.values if key not in ALLOWED]:
        hint = did_you_mean(unknown[0], ALLOWED)
        allowed = f"allowed here: {', '.join(ALLOWED)} (format: openai leaves others out)"
        raise ConfigError(f"{row.place}: unknown key {unknown[0]!r}; {hint}{allowed}")
    given = [key for key in ASKED if row.get(key) is not None]
    if len(given) != 1:
        raise row.error(", ".join(given) or "prompt", f"give one of {', '.join(ASKED)}")
    at_s = None if row.get("at_s") is None else row.seconds("at_s")
    return RecordedSession(_with_output(row, _turns(row, given[0])), at_s, _tools(row))


def _openai_session(row: Row) -> RecordedSession:
    return RecordedSession(turns_of(check_messages(row, "messages", row.get("messages"))), None, _tools(row))


def _turns(row: Row, key: str) -> tuple[RecordedTurn, ...]:
    value = row.get(key)
    if key == "prompt_tokens":
        row.tokens("output_tokens")
        return (RecordedTurn(prompt_tokens=row.tokens(key)),)
    if key == "messages":
        return turns_of(check_messages(row, key, value))
    texts = [value] if key == "prompt" else value
    if not isinstance(texts, list) or not texts or not all(isinstance(one, str) and one for one in texts):
        raise row.error(key, f"allowed is {'text' if key == 'prompt' else 'a list of texts'}, not empty")
    return tuple(RecordedTurn(({"role": "user", "content": text},)) for text in texts)


def _with_output(row: Row, turns: tuple[RecordedTurn, ...]) -> tuple[RecordedTurn, ...]:
    """`output_tokens` is the length of the last answer."""
    if row.get("output_tokens") is None:
        return turns
    last = turns[-1]
    kept = RecordedTurn(
        last.messages,
        last.prompt_tokens,
        row.tokens("output_tokens"),
        last.answer,
        last.pause_s,
        last.after_tool,
    )
    return (*turns[:-1], kept)


def _tools(row: Row) -> tuple[Message, ...]:
    tools: Any = row.get("tools")
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(map(_is_function, tools)):
        raise row.error("tools", "allowed is a list of {type: function, function: {name: …}}")
    return tuple(tools)


def _is_function(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


LENGTHS = Format("lowbit", ("prompt_tokens", "output_tokens"), _session)
PROMPTS = Format("lowbit", ("prompt",), _session)
TURNS = Format("lowbit", ("turns",), _session)
MESSAGES = Format("lowbit", ("messages",), _session)
OPENAI = Format("openai", ("messages",), _openai_session)
