"""From a row of a data set to a document: the forms that people's files have.

The first of these that a row has decides; a null field is as good as none. Everything that goes on to a tokenizer or a
template is checked here: strings are strings of whole characters, and what is nested is plain JSON.

    messages | conversations | conversation   [{role, content}, …] (OpenAI) or [{from, value}, …] (ShareGPT)
    text                                      plain text
    instruction (+ input | context)           + output | response | completion  (Alpaca, Dolly)
    prompt                                    + completion | response | output
    question | query                          + answer | response

Beside them: `domain`, `tools` (handed to the chat template), and `system` in all but `messages` and `text`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lowbit_core.text_file import half_character, quote
from lowbit_quantize.quality.document import Document, Message

CONVERSATIONS = ("messages", "conversations", "conversation")
PAIRS = (  # what is asked, what is added to it, what is answered
    ("instruction", ("input", "context"), ("output", "response", "completion")),
    ("prompt", (), ("completion", "response", "output")),
    ("question", (), ("answer", "response")),
    ("query", (), ("answer", "response")),
)
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "assistant": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
PASSED_ON = ("name", "tool_call_id", "reasoning_content")  # of a message, as they are
WANTED = (
    'a row is {"text": "…"}, {"messages": [{"role": "user", "content": "…"}, …]}, ShareGPT\'s conversations, '
    "instruction and output, prompt and completion, or question and answer"
)


class FormError(ValueError):
    """A row that is none of the forms; says what is wrong with it."""


def as_document(row: Any, place: str) -> Document:
    """The document of a row; raises FormError."""
    if not isinstance(row, Mapping):
        raise FormError(f"{_short(row)} is not an object; {WANTED}")
    keys = ", ".join(f"{key} (null)" if value is None else str(key) for key, value in row.items())
    row = {str(key): value for key, value in row.items() if value is not None}
    domain = _domain(row.get("domain", "text"))
    if key := next((key for key in CONVERSATIONS if row.get(key)), None):
        messages = _messages(row[key], key)
        if key != "messages":
            messages = (*_system(row, messages), *messages)
        return Document(domain, messages=messages, tools=_tools(row.get("tools")), place=place)
    if "text" in row:
        return Document(domain, text=_string(row["text"], "text"), place=place)
    for asked, added, answered in PAIRS:
        if asked in row and (answer := next((key for key in answered if key in row), None)):
            messages = _pair(row, asked, added, answer)
            return Document(domain, messages=messages, tools=_tools(row.get("tools")), place=place)
    raise FormError(f"its keys are {_short(keys) if keys else 'none'}; {WANTED}")


def _pair(row: Mapping[str, Any], asked: str, added: Sequence[str], answer: str) -> tuple[Message, ...]:
    if isinstance(row[asked], list | tuple):  # TRL's conversational form
        start, end = _messages(row[asked], asked), row[answer]
        answers = _messages(end, answer) if isinstance(end, list | tuple) else ()
        messages = (*start, *(answers or (_said("assistant", _string(end, answer)),)))
        return (*_system(row, messages), *messages)
    parts = [_string(row[key], key) for key in (asked, *added) if key in row]
    question = "\n".join(part for part in parts if part)
    messages = (*_history(row), _said("user", question), _said("assistant", _string(row[answer], answer)))
    return (*_system(row, messages), *messages)


def _history(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """Earlier turns of LLaMA-Factory's Alpaca form: [[question, answer], …]."""
    turns = _listed(row.get("history", []), "history")
    if any(not isinstance(turn, list | tuple) or len(turn) != 2 for turn in turns):
        raise FormError(f'history is {_short(turns)}; it is [["question", "answer"], …]')
    return tuple(
        _said(role, _string(one, "history"))
        for turn in turns
        for role, one in zip(("user", "assistant"), turn, strict=True)
    )


def _system(row: Mapping[str, Any], messages: Sequence[Message]) -> tuple[Message, ...]:
    text = _string(row.get("system", ""), "system")
    has_one = bool(messages) and messages[0]["role"] == "system"
    return (_said("system", text),) if text and not has_one else ()


def _messages(value: Any, key: str) -> tuple[Message, ...]:
    if isinstance(value, Mapping):  # columns, as data sets write a list of structs
        columns = {name: _listed(one, f"{key}.{name}") for name, one in value.items() if one is not None}
        if len({len(one) for one in columns.values()}) > 1:
            raise FormError(f"{key} is {_short(value)}; its columns differ in length")
        value = [dict(zip(columns, one, strict=True)) for one in zip(*columns.values(), strict=True)]
    messages = tuple(
        _message(one, f"{key}.{number}") for number, one in enumerate(_listed(value, key)) if one is not None
    )
    if not messages:
        raise FormError(f"{key} is an empty conversation; {WANTED}")
    return messages


def _message(one: Any, key: str) -> Message:
    if not isinstance(one, Mapping):
        raise FormError(f'{key} is {_short(one)}; it is {{"role": "user", "content": "…"}}')
    one = {str(name): value for name, value in one.items() if value is not None}
    calls = _calls(one.get("tool_calls") or [], f"{key}.tool_calls")
    if "role" in one:
        role, content = _string(one["role"], f"{key}.role"), _content(one, "content", key, calls)
    else:
        speaker = _string(one.get("from", ""), f"{key}.from")
        if speaker not in SHAREGPT_ROLES:
            known = ", ".join(SHAREGPT_ROLES)
            raise FormError(
                f"{key} has neither role nor a known from ({_short(speaker)}); from is one of {known}"
            )
        role, content = SHAREGPT_ROLES[speaker], _content(one, "value", key, calls)
        if speaker == "function_call" and (called := _written_calls(content, key)):
            calls, content = called, ""
    message = {name: _string(one[name], f"{key}.{name}") for name in PASSED_ON if name in one}
    return {**_said(role, content), **message, **({"tool_calls": calls} if calls else {})}


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _content(one: Mapping[str, Any], name: str, key: str, calls: Sequence[Any]) -> str:
    """A string, or content parts of text joined by line ends, as vLLM hands them to a template; none beside a call."""
    if name not in one:
        if calls:
            return ""
        raise FormError(f"{key} has no {name}; only a message with tool_calls goes without")
    value = one[name]
    if not isinstance(value, list | tuple):
        return _string(value, f"{key}.{name}")
    return "\n".join(_part(part, f"{key}.{name}.{number}") for number, part in enumerate(value))


def _part(part: Any, key: str) -> str:
    if isinstance(part, Mapping):
        if part.get("text") is not None:
            return _string(part["text"], f"{key}.text")
        raise FormError(f"{key} is a part of type {_short(part.get('type'))} without text; only text is read")
    return _string(part, key)


def _calls(value: Any, key: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, as vLLM hands them to a template."""
    return [_call(one, f"{key}.{number}") for number, one in enumerate(_listed(value, key))]


def _call(one: Any, key: str) -> dict[str, Any]:
    inner = one.get("function", one) if isinstance(one, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise FormError(f'{key} is {_short(one)}; it is {{"function": {{"name": "…", "arguments": "…"}}}}')
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{key}.arguments") if arguments.strip() else {}
    function = {"name": inner["name"], "arguments": {} if arguments is None else arguments}
    return _plain(
        {**({"id": one["id"]} if one.get("id") else {}), "type": "function", "function": function}, key
    )


def _written_calls(content: str, key: str) -> list[dict[str, Any]]:
    """The calls that a ShareGPT turn `function_call` holds as JSON; none where it is written otherwise."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        return []
    return _calls(data if isinstance(data, list) else [data], key)


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    tools = _listed(value or [], "tools")
    if any(not isinstance(one, Mapping) for one in tools):
        raise FormError(f"tools is {_short(value)}; it is a list of objects")
    return tuple(_plain(dict(one), "tools") for one in tools)


def _listed(value: Any, key: str) -> Sequence[Any]:
    """A list; or one that a table's column holds as JSON."""
    if isinstance(value, str) and value.strip():
        value = _json(value, key)
    if not isinstance(value, list | tuple):
        raise FormError(f"{key} is {_short(value)}; it is a list")
    return value


def _json(text: str, key: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise FormError(f"{key} is {_short(text)}; it is JSON") from None


def _plain(value: dict[str, Any], key: str) -> dict[str, Any]:
    """The value if it is JSON of whole characters."""
    try:
        half = half_character(json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError):
        raise FormError(f"{key} is {_short(value)}; it is JSON") from None
    if half:
        raise FormError(f"{key} holds half of a surrogate pair in {half}; write the whole character")
    return value


def _string(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise FormError(f"{key} is {_short(value)}; it is a string")
    if half := half_character(value):
        raise FormError(f"{key} holds half of a surrogate pair in {half}; write the whole character")
    return str(value)


def _domain(value: Any) -> str:
    if not isinstance(value, str | int | float):
        raise FormError(f"domain is {_short(value)}; it is a string")
    return _string(str(value), "domain")


def _short(value: Any) -> str:
    try:
        return quote(value) if isinstance(value, str) else quote(repr(value))[1:-1]
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"
