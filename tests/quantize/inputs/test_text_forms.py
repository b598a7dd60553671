"""Rows as people have them become documents; what is none is refused before a tokenizer or a template sees it."""

from typing import Any

import pytest

from lowbit_quantize.quality.forms import SHAREGPT_ROLES, FormError, as_document

ASK, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
SYSTEM = {"role": "system", "content": "Be brief"}
CALL = {"type": "function", "function": {"name": "sum", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "sum", "parameters": {}}}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [ASK, ANSWER]}, [ASK, ANSWER]),
        ({"messages": [{**ASK, "tool_calls": None, "name": None}, ANSWER], "text": None}, [ASK, ANSWER]),
        ({"messages": '[{"role": "user", "content": "Hi"}]'}, [ASK]),  # a table's column
        ({"messages": {"role": ["user", "assistant"], "content": ["Hi", "Yes"]}}, [ASK, ANSWER]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, [ASK]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, "there"]}]},
            [{"role": "user", "content": "Hi\nthere"}],
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "sum", "arguments": '{"a": 1}'}}]}]},
            [{"role": "assistant", "content": "", "tool_calls": [{"id": "1", **CALL}]}],
        ),
        (
            {"messages": [{"role": "tool", "content": "3", "tool_call_id": "1", "name": "sum"}]},
            [{"role": "tool", "content": "3", "tool_call_id": "1", "name": "sum"}],
        ),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}, [ASK, ANSWER]),
        (
            {"conversations": [{"from": "system", "value": "Be brief"}, {"from": "user", "value": "Hi"}]},
            [SYSTEM, ASK],
        ),
        ({"conversations": [{"from": "human", "value": "Hi"}], "system": "Be brief"}, [SYSTEM, ASK]),
        ({"conversation": [ASK, ANSWER]}, [ASK, ANSWER]),
        (
            {"conversations": [{"from": "function_call", "value": '{"name": "sum", "arguments": {"a": 1}}'},
                               {"from": "observation", "value": "3"}]},
            [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}],
        ),
        ({"instruction": "Hi", "input": "", "output": "Yes"}, [ASK, ANSWER]),
        ({"instruction": "Hi", "input": "you", "output": "Yes"}, [{"role": "user", "content": "Hi\nyou"}, ANSWER]),
        ({"instruction": "Hi", "context": None, "response": "Yes", "category": "x"}, [ASK, ANSWER]),
        ({"instruction": "Hi", "output": "Yes", "system": "Be brief", "history": [["a", "b"]]},
         [SYSTEM, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, ASK, ANSWER]),
        ({"prompt": "Hi", "completion": "Yes"}, [ASK, ANSWER]),
        ({"prompt": "Hi", "response": "Yes"}, [ASK, ANSWER]),
        ({"prompt": [SYSTEM, ASK], "completion": [ANSWER]}, [SYSTEM, ASK, ANSWER]),
        ({"question": "Hi", "answer": "Yes"}, [ASK, ANSWER]),
    ],
)  # fmt: skip
def test_conversations_of_every_form_are_read(row: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    assert list(as_document(row, "here").messages) == messages


@pytest.mark.parametrize("speaker", list(SHAREGPT_ROLES))
def test_every_speaker_of_sharegpt_has_a_role(speaker: str) -> None:
    document = as_document({"conversations": [{"from": speaker, "value": "Hi"}]}, "here")
    assert document.messages[0]["role"] in ("user", "assistant", "system", "tool")


def test_the_first_form_of_the_table_decides_and_null_fields_are_absent() -> None:
    assert as_document({"text": "t", "messages": None, "prompt": "p", "completion": "c"}, "here").text == "t"
    assert as_document({"text": "t", "messages": [ASK]}, "here").messages == (ASK,)
    assert as_document({"text": "t", "messages": []}, "here").text == "t"
    assert as_document({"text": "", "domain": None}, "here").domain == "text"
    assert as_document({"prompt": "Hi", "completion": "Yes", "answer": "No"}, "here").messages == (
        ASK,
        ANSWER,
    )


@pytest.mark.parametrize(
    "tools", [[TOOL], '[{"type": "function", "function": {"name": "sum", "parameters": {}}}]']
)
def test_tools_go_along_as_a_list_or_as_json(tools: Any) -> None:
    assert as_document({"messages": [ASK], "tools": tools}, "here").tools == (TOOL,)


def test_the_words_of_a_tool_call_are_words_of_the_document() -> None:
    row = {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}, ASK]}
    assert "sum" in as_document(row, "here").words


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (7, "7 is not an object"),
        (None, "not an object"),
        ({}, "its keys are none; a row is"),
        ({"txt": "a"}, "its keys are 'txt'; a row is"),
        ({"prompt": "a"}, "its keys are 'prompt'"),
        ({"text": 3}, "text is 3; it is a string"),
        ({"text": b"a"}, "it is a string"),
        ({"text": "a \ud83d"}, "text holds half of a surrogate pair"),
        ({"text": "a", "domain": {"b": 1}}, "domain is"),
        ({"messages": "Hi"}, "messages is 'Hi'; it is JSON"),
        ({"messages": [3]}, "messages.0 is 3"),
        ({"messages": [{"role": "user"}]}, "messages.0 has no content; only a message with tool_calls"),
        ({"messages": [{"role": 3, "content": "a"}]}, "messages.0.role is 3"),
        ({"messages": [{"role": "user\udc00", "content": "a"}]}, "messages.0.role holds half"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "messages.0.content is"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "only text is read"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [1]}]}, "tool_calls.0 is 1"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]}, "is JSON"),
        ({"messages": [ASK], "tools": ["f"]}, "tools is"),
        ({"messages": [ASK], "tools": [{"a": "\udfff"}]}, "tools holds half"),
        ({"messages": [ASK], "tools": [{"a": object()}]}, "it is JSON"),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "a known from ('narrator'); from is one of human"),
        ({"conversations": [{"value": "a"}]}, "neither role nor a known from"),
        ({"messages": {"role": ["user"], "content": []}}, "columns differ in length"),
        ({"instruction": "a", "output": ["b"]}, "output is"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "history is"),
        ({"question": "a", "answer": 3}, "answer is 3"),
    ],
)  # fmt: skip
def test_what_is_no_document_is_refused_with_a_short_quote(row: Any, words: str) -> None:
    with pytest.raises(FormError) as caught:
        as_document(row, "here")
    line = str(caught.value)
    assert words in line
    assert len(line) < 450
    line.encode()  # it holds no half character itself
