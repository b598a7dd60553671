"""Anthropic's Messages API on the real engine: the `anthropic` package chats, streams, calls a tool and counts tokens.

Every body is validated by the package's own types, which its client itself does not do.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest
import yaml
from anthropic import (
    Anthropic,
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
    RateLimitError,
)
from anthropic.types import ErrorResponse, Message, MessageTokensCount, RawMessageStreamEvent
from prometheus_client.parser import text_string_to_metric_families
from pydantic import TypeAdapter
from scripts.demo import KV_CACHE_GIB, LOWBIT, MODEL
from tests.e2e.conftest import Demo

from lowbit_core.server_process import free_port, start_server
from lowbit_server.gateway.keys import digest, new_key

pytestmark = pytest.mark.engine

QUESTION: dict[str, Any] = {  # as the client's methods take it; they know no temperature
    "model": MODEL, "max_tokens": 24, "extra_body": {"temperature": 0},
    "messages": [{"role": "user", "content": "What is the capital of Germany?"}],
}  # fmt: skip
BODY = {name: value for name, value in QUESTION.items() if name != "extra_body"} | QUESTION["extra_body"]
CITY = {"type": "string", "enum": ["Rome", "Oslo"]}
TOOL: dict[str, Any] = {
    "name": "look_up", "description": "Look up a city.", "strict": True,
    "input_schema": {
        "type": "object", "properties": {"city": CITY}, "required": ["city"], "additionalProperties": False,
    },
}  # fmt: skip
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


@dataclass
class Served:
    """A server with three keys: a user's, one of two requests a minute, and an admin's."""

    url: str
    user: str
    few: str
    admin: str

    def client(self, key: str = "") -> Any:  # the messages here are plain dicts, which its types do not take
        return Anthropic(base_url=self.url, api_key=key or self.user, max_retries=0)

    def tokens(self, kind: str) -> float:
        """What the server has counted of the user's key."""
        page = httpx.get(f"{self.url}/metrics", headers={"x-api-key": self.admin}).text
        samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
        return sum(
            one.value
            for one in samples
            if one.name == "lowbit_key_tokens_total"
            and one.labels["key"] == "user"
            and one.labels["kind"] == kind
        )


@pytest.fixture(scope="module")
def served(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder, port = tmp_path_factory.mktemp("messages"), free_port()
    user, few, admin = new_key(), new_key(), new_key()
    keys = [
        {"name": "user", "sha256": digest(user), "priority": -1},
        {"name": "few", "sha256": digest(few), "requests_per_minute": 2},
        {"name": "admin", "sha256": digest(admin), "admin": True},
    ]
    (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": keys}))
    command = [
        *LOWBIT, "serve", str(demo.checkpoint), "--port", str(port), "--served-model-name", MODEL, "--enforce-eager",
        "--kv-cache-gib", KV_CACHE_GIB, "--api-keys", str(folder / "keys.yaml"), "--tool-call-parser", "hermes",
    ]  # fmt: skip
    server = start_server(command, f"http://127.0.0.1:{port}", folder / "serve.log", name="lowbit serve")
    try:
        while_loading(server.url, folder / "serve.log")
        server.wait_until_ready()
        yield Served(server.url, user, few, admin)
        assert server.stop() == 0
    finally:
        server.kill()


def while_loading(url: str, log: Path) -> None:
    """A question that comes too early is refused in Anthropic's shape, with a time to come back."""
    with httpx.Client(transport=httpx.HTTPTransport(retries=20), timeout=60) as client:
        answer = client.post(f"{url}/v1/messages", json=BODY)
    assert answer.status_code == 503, log.read_text()
    assert sound_error(answer.json()).error.type == "overloaded_error"
    assert answer.headers["retry-after"]


def sound_error(document: Any) -> ErrorResponse:
    assert document.keys() <= {"type", "error", "request_id"}
    return ErrorResponse.model_validate(document, strict=True)


def test_a_chat_is_answered_and_counted_by_its_key(served: Served) -> None:
    prompt, generated = served.tokens("prompt"), served.tokens("generated")
    raw = served.client().messages.with_raw_response.create(**QUESTION, system="You answer in one sentence.")
    message = Message.model_validate(raw.http_response.json(), strict=True)
    assert message.content[0].type == "text"
    assert "Berlin" in message.content[0].text
    assert message.stop_reason == "end_turn"
    assert served.tokens("prompt") - prompt == message.usage.input_tokens
    assert served.tokens("generated") - generated == message.usage.output_tokens
    assert raw.headers["request-id"] == raw.headers["x-request-id"]


def test_a_stream_says_what_the_whole_answer_says(served: Served) -> None:
    whole = served.client().messages.create(**QUESTION)
    with served.client().messages.stream(**QUESTION) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_message()
    assert [block.model_dump() for block in message.content] == [
        block.model_dump() for block in whole.content
    ]
    assert (message.stop_reason, message.usage.output_tokens) == (
        whole.stop_reason,
        whole.usage.output_tokens,
    )
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    headers = {"x-api-key": served.user}
    with httpx.stream(
        "POST", f"{served.url}/v1/messages", json=BODY | {"stream": True}, headers=headers
    ) as raw:
        lines = [line for line in raw.iter_lines() if line]
    names, data = lines[::2], lines[1::2]
    for name, one in zip(names, data, strict=True):
        event = EVENT.validate_python(json.loads(one.removeprefix("data: ")))
        assert name == f"event: {event.type}"


def test_a_tool_is_called_and_its_result_is_read(served: Served) -> None:
    asked = QUESTION | {
        "messages": [{"role": "user", "content": "Where is the Colosseum?"}],
        "max_tokens": 64,
    }
    raw = served.client().messages.with_raw_response.create(
        **asked, tools=[TOOL], tool_choice={"type": "any"}
    )
    message = Message.model_validate(raw.http_response.json(), strict=True)
    (call,) = [block for block in message.content if block.type == "tool_use"]
    assert (message.stop_reason, call.name) == ("tool_use", "look_up")
    assert call.input["city"] in {"Rome", "Oslo"}
    with served.client().messages.stream(**asked, tools=[TOOL], tool_choice={"type": "any"}) as stream:
        streamed = stream.get_final_message()
    assert [block.input for block in streamed.content if block.type == "tool_use"] == [call.input]
    told = [
        {"role": "assistant", "content": [call.model_dump(include={"type", "id", "name", "input"})]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "in Italy"}]},
    ]
    after = served.client().messages.create(
        **asked | {"messages": [*asked["messages"], *told]}, tools=[TOOL], tool_choice={"type": "none"}
    )
    assert after.content[0].type == "text"


def test_tokens_are_counted_as_the_chat_reads_them(served: Served) -> None:
    asked = {name: QUESTION[name] for name in ("model", "messages")} | {
        "system": "You answer in one sentence."
    }
    raw = served.client().messages.with_raw_response.count_tokens(**asked)
    counted = MessageTokensCount.model_validate(raw.http_response.json(), strict=True)
    message = served.client().messages.create(**asked, max_tokens=1)
    assert counted.input_tokens == message.usage.input_tokens
    assert message.stop_reason == "max_tokens"


def test_refusals_are_anthropics_errors(served: Served) -> None:
    with pytest.raises(AuthenticationError) as wrong:
        served.client("lb-wrong").messages.create(**QUESTION)
    assert sound_error(wrong.value.body).error.type == "authentication_error"
    with pytest.raises(NotFoundError) as missing:
        served.client().messages.create(**QUESTION | {"model": "other"})
    assert sound_error(missing.value.body).error.type == "not_found_error"
    few = served.client(served.few)
    for _ in range(2):
        few.messages.count_tokens(model=MODEL, messages=QUESTION["messages"])
    with pytest.raises(RateLimitError) as often:
        few.messages.create(**QUESTION)
    assert sound_error(often.value.body).error.type == "rate_limit_error"
    assert int(often.value.response.headers["retry-after"]) <= 30


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "song", "text": "x"}]}]}, "type"),
        ({"temperature": 9}, "temperature"),
        ({"tool_choice": {"type": "tool"}}, "name"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, "context length"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, "budget_tokens"),
    ],
)
def test_the_engines_refusals_are_anthropics_errors_too(
    served: Served, changes: dict[str, Any], named: str
) -> None:
    for asked in (BODY | changes, BODY | changes | {"stream": True}):
        with pytest.raises(BadRequestError) as refused:
            served.client().post("/v1/messages", cast_to=httpx2.Response, body=asked)
        error = sound_error(refused.value.body).error
        assert error.type == "invalid_request_error"
        assert named in error.message
        assert "\n" not in error.message


def test_a_deadline_ends_a_stream_with_an_error_event(served: Served) -> None:
    client = served.client()
    asked = QUESTION | {
        "max_tokens": 2000,
        "messages": [{"role": "user", "content": "Write a very long story."}],
    }
    with pytest.raises(APIStatusError) as late:
        for _ in client.messages.create(**asked, stream=True, extra_headers={"x-request-timeout": "1.5"}):
            pass
    assert sound_error(late.value.body).error.type == "timeout_error"
