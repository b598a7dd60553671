"""Anthropic's Messages API behind the gateway, in front of a small app that is not vLLM: `anthropic` is the client."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from anthropic import APIStatusError, AsyncAnthropic, AuthenticationError
from anthropic.types import ErrorResponse
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp
from tests.server.gateway.key_files import key_file
from tests.server.gateway.test_middleware import NO_LIMITS

from lowbit_server.gateway.keys import KeyStore
from lowbit_server.gateway.middleware import AdminPort, Gateway
from lowbit_server.gateway.openai_errors import normalized
from lowbit_server.gateway.request_limits import Models, ServerLimits
from lowbit_server.gateway.request_tracker import RequestTracker
from lowbit_server.http.loading import Loading

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
HELLO: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "messages": [{"role": "user", "content": "hello"}]}
ANSWER = {
    "id": "msg_1", "type": "message", "role": "assistant", "model": "tiny", "stop_reason": "end_turn",
    "content": [{"type": "text", "text": "hi"}], "usage": {"input_tokens": 10, "output_tokens": 20},
}  # fmt: skip
START = {"type": "message_start", "message": ANSWER | {"content": [], "stop_reason": None}}
# What vLLM sends when its engine dies in the middle: the error of reading its own chat stream.
MISREAD = "2 validation errors for ChatCompletionStreamResponse\nmodel\n  Field required [type=missing, input_value=x]"


def event(document: dict[str, Any]) -> bytes:
    return f"event: {document['type']}\ndata: {json.dumps(document)}\n\n".encode()


class Served:
    """A gateway around an app that answers as vLLM's Messages API does."""

    def __init__(self, keys: KeyStore | None = None, **limits: Any) -> None:
        self.tracker, self.draining = RequestTracker(write_log=False), False
        inner = self.inner = FastAPI()

        @inner.post(MESSAGES)
        async def messages(request: Request) -> Any:
            content = (await request.json())["messages"][0]["content"]
            if content == "wrong":
                error = {"type": "BadRequestError", "message": "no such role"}
                return JSONResponse({"type": "error", "error": error}, 400)
            if content == "busy":
                text = "The engine is currently busy and cannot accept new requests."
                return JSONResponse({"type": "error", "error": {"type": "x", "message": text}}, 503)
            if content == "slow":
                await asyncio.sleep(30)
            if content == "crash":
                raise RuntimeError("broken")
            if content in ("dies", "breaks", "stops"):
                return StreamingResponse(events(content), media_type="text/event-stream")
            self.tracker.engine_finished(f"chatcmpl-{request.headers['x-request-id']}", 10, 20)
            return ANSWER

        async def events(how: str) -> AsyncIterator[bytes]:
            yield event(START)
            if how == "stops":
                await asyncio.sleep(30)
            if how == "breaks":
                raise RuntimeError("broken")
            yield event({"type": "error", "error": {"type": "internal_error", "message": MISREAD}})
            yield event({"type": "message_stop"})

        @inner.post(COUNT)
        async def count() -> dict[str, int]:
            return {"input_tokens": 3}

        self.gateway = Gateway(
            inner, ServerLimits(**NO_LIMITS | limits), keys, self.tracker, Models("tiny", {"tiny"}.__contains__),
            is_draining=lambda: self.draining,
        )  # fmt: skip
        self.http = http_of(self.gateway)

    def client(self, key: str = "none") -> AsyncAnthropic:
        return AsyncAnthropic(api_key=key, base_url="http://test", http_client=self.http, max_retries=0)

    async def post(self, content: str = "hello", path: str = MESSAGES, **changes: Any) -> httpx2.Response:
        body = HELLO | {"messages": [{"role": "user", "content": content}]} | changes
        return await self.http.post(path, json=body)


def http_of(app: ASGIApp) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app, raise_app_exceptions=False), base_url="http://test"
    )


def error_of(document: Any) -> tuple[str, str]:
    """Type and message of an error in Anthropic's shape."""
    assert document.keys() <= {"type", "error", "request_id"}
    assert document["error"].keys() == {"type", "message"}
    if document["error"]["type"] != "request_too_large":  # documented, and missing in the package's types
        ErrorResponse.model_validate(document, strict=True)
    return document["error"]["type"], document["error"]["message"]


async def test_messages_are_counted_by_key_as_chats_are(tmp_path: Path) -> None:
    served = Served(KeyStore(key_file(tmp_path / "k", {"name": "a", "tokens_per_minute": 50})))
    client = served.client("a-secret")
    answer = await client.messages.create(**HELLO)
    assert answer.content[0].text == "hi"
    assert (await client.messages.count_tokens(model="tiny", messages=HELLO["messages"])).input_tokens == 3
    assert served.tracker.tokens == {("a", "prompt"): 10, ("a", "generated"): 20}
    assert served.tracker.outcomes == {("a", "ok"): 2}
    await client.messages.create(**HELLO)
    with pytest.raises(APIStatusError) as refused:  # the engine counted 2 x 30
        await client.messages.create(**HELLO)
    assert refused.value.status_code == 429
    assert error_of(refused.value.body)[0] == "rate_limit_error"


async def test_a_wrong_key_is_anthropics_authentication_error(tmp_path: Path) -> None:
    served = Served(KeyStore(key_file(tmp_path / "k", {"name": "a"})))
    with pytest.raises(AuthenticationError) as refused:
        await served.client("wrong").messages.create(**HELLO)
    assert error_of(refused.value.body)[0] == "authentication_error"
    assert refused.value.request_id == refused.value.body["request_id"]  # type: ignore[index]
    with pytest.raises(AuthenticationError):
        await served.client("wrong").messages.count_tokens(model="tiny", messages=HELLO["messages"])


@pytest.mark.parametrize(
    ("asked", "status", "kind"),
    [
        ({"model": "other"}, 404, "not_found_error"),
        ({"content": "x" * 20_000}, 413, "request_too_large"),
        ({"content": "x" * 400}, 400, "invalid_request_error"),
        ({"system": "x" * 400}, 400, "invalid_request_error"),
        ({"max_tokens": 101}, 400, "invalid_request_error"),
        ({"content": "wrong"}, 400, "invalid_request_error"),
        ({"content": "busy"}, 429, "rate_limit_error"),
        ({"content": "slow"}, 504, "timeout_error"),
        ({"content": "crash"}, 500, "api_error"),
        ({"path": MESSAGES + "/batches"}, 404, "not_found_error"),
        ({"path": COUNT, "model": "other"}, 404, "not_found_error"),
    ],
)
async def test_every_error_has_anthropics_shape(asked: dict[str, Any], status: int, kind: str) -> None:
    served = Served(max_prompt_characters=300, max_output_tokens=100, request_timeout_s=0.2)
    answer = await served.post(**asked)
    assert (answer.status_code, error_of(answer.json())[0]) == (status, kind)
    assert answer.json()["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]


async def test_what_is_no_request_for_it_has_anthropics_shape_too(tmp_path: Path) -> None:
    entries = {"name": "poet", "models": ["poet"]}, {"name": "few", "requests_per_minute": 1}
    served = Served(KeyStore(key_file(tmp_path / "k", *entries)))
    few, json_type = {"x-api-key": "few-secret"}, {"content-type": "application/json"}
    cases = [
        (
            await served.http.post(MESSAGES, json=HELLO, headers={"x-api-key": "poet-secret"}),
            403,
            "permission_error",
        ),
        (await served.http.get(MESSAGES, headers=few), 405, "invalid_request_error"),
        (await served.http.post(MESSAGES, content=b"{}", headers=few), 415, "invalid_request_error"),
        (
            await served.http.post(MESSAGES, content=b"{", headers=few | json_type),
            400,
            "invalid_request_error",
        ),
        (await served.http.post(MESSAGES, json=HELLO, headers=few), 200, ""),
        (await served.http.post(MESSAGES, json=HELLO, headers=few), 429, "rate_limit_error"),
        (
            await served.http.post(MESSAGES, json=HELLO, headers=few | {"api-key": "x"}),
            401,
            "authentication_error",
        ),
        (
            await served.http.post(MESSAGES, json=HELLO, headers=few | {"x": "y" * 5000}),
            431,
            "invalid_request_error",
        ),
    ]
    for answer, status, kind in cases:
        assert answer.status_code == status
        assert status == 200 or error_of(answer.json())[0] == kind


async def test_loading_draining_and_the_admin_port_answer_in_anthropics_shape() -> None:
    served = Served()
    served.draining = True
    for app, status, kind in (
        (served.gateway, 503, "overloaded_error"),
        (Loading(), 503, "overloaded_error"),
        (AdminPort(served.inner), 404, "not_found_error"),
    ):
        for path in (MESSAGES, COUNT):
            answer = await http_of(app).post(path, json=HELLO)
            assert (answer.status_code, error_of(answer.json())[0]) == (status, kind)


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ("dies", "api_error", "the engine failed on this request"),
        ("breaks", "api_error", "the server failed on this request"),
        ("stops", "timeout_error", "not finished within 0.2 s"),
    ],
)
async def test_a_stream_that_fails_ends_with_an_error_event(how: str, kind: str, said: str) -> None:
    served = Served(request_timeout_s=0.2)
    first, last = (await served.post(how, stream=True)).text.strip().split("\n\n")
    assert first.startswith("event: message_start\n")
    name, _, data = last.partition("\ndata: ")
    assert (name, error_of(json.loads(data))) == ("event: error", (kind, said))
    with pytest.raises(APIStatusError) as failed:
        async for _ in await served.client().messages.create(
            **HELLO | {"messages": [{"role": "user", "content": how}]}, stream=True
        ):
            pass
    assert error_of(failed.value.body)[0] == kind


async def test_what_a_key_has_left_is_said_in_anthropics_headers(tmp_path: Path) -> None:
    served = Served(KeyStore(key_file(tmp_path / "k", {"name": "a", "requests_per_minute": 2})))
    began = datetime.now(UTC)
    left = []
    for _ in range(3):
        answer = await served.http.post(MESSAGES, json=HELLO, headers={"x-api-key": "a-secret"})
        assert answer.headers["anthropic-ratelimit-requests-limit"] == "2"
        reset = datetime.fromisoformat(answer.headers["anthropic-ratelimit-requests-reset"])
        assert began - timedelta(seconds=1) < reset < began + timedelta(seconds=70)
        left.append((answer.status_code, answer.headers["anthropic-ratelimit-requests-remaining"]))
    assert left == [(200, "1"), (200, "0"), (429, "0")]
    assert "anthropic-ratelimit-tokens-limit" not in answer.headers


def test_the_engines_validation_errors_name_their_field() -> None:
    detail = "1 validation error:\n  {'type': 'missing', 'loc': 'body.max_tokens', 'msg': 'Field required'}"
    body = json.dumps({"error": {"message": detail, "type": "Bad Request", "code": 400}}).encode()
    status, document = normalized(422, body, "messages", "anthropic", "r1")
    assert (status, error_of(json.loads(document))) == (
        400, ("invalid_request_error", "max_tokens: Field required"),
    )  # fmt: skip
    status, document = normalized(
        400, json.dumps({"error": {"message": "no", "param": "top_k"}}).encode(), None, "anthropic"
    )
    assert error_of(json.loads(document))[1] == "top_k: no"
