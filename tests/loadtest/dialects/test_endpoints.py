"""What each API is sent: the same conversation in five forms."""

from typing import Any

import pytest

from lowbit_loadtest.generate.endpoints import ENDPOINTS, endpoint_named, split_endpoint
from lowbit_loadtest.generate.endpoints.piece import error_message, error_of, read_usage
from lowbit_loadtest.generate.request import Message, Request

TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "d", "parameters": {"type": "object"}},
}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
TALK: tuple[Message, ...] = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is it?"}, PICTURE]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "a cat"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Sure?"},
)


def body(name: str, messages: tuple[Message, ...] = TALK, **changes: Any) -> dict[str, Any]:
    return endpoint_named(name).body(Request(messages, max_tokens=9, temperature=0.5, seed=3, **changes), "m")


def test_chat_is_sent_as_it_is() -> None:
    sent = body("chat", tools=(TOOL,), exact=True)
    assert (sent["messages"], sent["tools"], sent["ignore_eos"]) == (list(TALK), [TOOL], True)
    assert (sent["max_tokens"], sent["seed"], sent["stream_options"]) == (9, 3, {"include_usage": True})


def test_a_completion_and_an_embedding_have_the_conversations_words() -> None:
    words = "Be brief.\nWhat is it?\n\na cat\nA cat.\nSure?"
    assert body("completions")["prompt"] == words
    assert body("embeddings") == {"model": "m", "input": words, "encoding_format": "float"}


def test_a_response_has_items() -> None:
    sent = body("responses", tools=(TOOL,))
    assert sent["input"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [
            {"type": "input_text", "text": "What is it?"},
            {"type": "input_image", "image_url": "data:image/png;base64,AA=="},
        ]},
        {"type": "function_call", "call_id": "1", "name": "look", "arguments": '{"at": 1}'},
        {"type": "function_call_output", "call_id": "1", "output": "a cat"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]  # fmt: skip
    assert sent["tools"] == [{"type": "function", **TOOL["function"]}]  # type: ignore[dict-item]
    assert sent["max_output_tokens"] == 9
    assert not {"seed", "messages", "stream_options"} & sent.keys()


def test_a_message_has_blocks_and_its_system_apart() -> None:
    sent = body("messages", tools=(TOOL,))
    assert sent["system"] == "Be brief."
    assert sent["messages"] == [
        {"role": "user", "content": [
            {"type": "text", "text": "What is it?"},
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}},
        ]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "look", "input": {"at": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "a cat"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]  # fmt: skip
    assert sent["tools"] == [{"name": "look", "description": "d", "input_schema": {"type": "object"}}]
    assert (sent["max_tokens"], "seed" in sent) == (9, False)


def test_every_endpoint_is_found_by_its_path_and_has_its_limit_in_its_body() -> None:
    for one in ENDPOINTS:
        assert split_endpoint(f"http://h/x/v1/{one.path}/") == ("http://h/x/v1", one)
        assert split_endpoint(f"http://h/deployments/n/{one.path}") == ("http://h/deployments/n", one)
        sent = body(one.name)
        assert all(key in sent for key in one.limit_keys[-1:])
        assert sent.get("stream", False) == one.streams


@pytest.mark.parametrize(
    "url", ["http://h", "http://h/v1", "http://completions", "http://h/completions", "http://h/a/messages"]
)
def test_a_prefix_is_no_endpoint(url: str) -> None:
    assert split_endpoint(url) == (url, None)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 1, "completion_tokens": 2}, (1, 2, None, None, False)),
        ({"prompt_tokens": 1, "completion_tokens": 2, "prompt_tokens_details": None}, (1, 2, None, None, False)),
        ({"input_tokens": 1, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 1}}, (1, 2, None, 1, False)),
        ({"input_tokens": 1, "output_tokens": 9, "output_tokens_details": {"reasoning_tokens": 5}},
         (1, 9, 5, None, False)),
        ({"input_tokens": 1, "output_tokens": 9, "reasoning_tokens": 5, "total_tokens": 15}, (1, 9, 5, None, True)),
        ({"total_tokens": 15}, (None, None, None, None, False)),
        ({"prompt_tokens": "x", "completion_tokens": 2.5}, (None, None, None, None, False)),
        ({"prompt_tokens": float("nan"), "completion_tokens": float("inf")}, (None, None, None, None, False)),
    ],
)  # fmt: skip
def test_usage_is_what_the_server_can_mean(usage: dict[str, Any], expected: tuple[Any, ...]) -> None:
    found = read_usage(usage)
    assert found is not None
    assert (
        found.prompt_tokens, found.output_tokens, found.reasoning_tokens, found.cached_tokens, found.reasoning_apart
    ) == expected  # fmt: skip


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"error": None}, None),
        ({"error": ""}, None),
        ({"error": {}}, None),
        ({"error": "a\n b"}, "a b"),
        ({"error": {"message": "m", "code": 1}}, "m"),
        ({"error": {"code": 1}}, '{"code": 1}'),
        ({"error": {"message": None, "detail": "d"}}, "d"),
        ({"error": True, "message": "m"}, "m"),
        ({"object": "error", "message": "m"}, "m"),
        ({"type": "error", "error": {"message": "m"}}, "m"),
        ({"type": "error", "message": "m"}, "m"),
        ({"object": "chat.completion.chunk", "choices": []}, None),
    ],
)
def test_an_error_is_told_and_its_words_are_kept(event: dict[str, Any], message: str | None) -> None:
    assert error_of(event) == message


def test_a_body_that_is_no_json_is_its_own_message() -> None:
    assert error_message("<html>\n bad gateway") == "<html> bad gateway"
    assert error_message('"quoted"') == '"quoted"'
    assert error_message("[1, 2]") == "[1, 2]"
