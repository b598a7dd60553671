"""Keys, limits, deadlines and error shapes, in front of a small app that is not vLLM."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from tests.server.gateway.key_files import key_file

from lowbit_server.app import with_cors
from lowbit_server.config import ServeConfig
from lowbit_server.gateway.keys import KeyStore
from lowbit_server.gateway.middleware import AdminPort, Gateway
from lowbit_server.gateway.request_limits import Models, ServerLimits
from lowbit_server.gateway.request_tracker import RequestTracker

CHAT = "/v1/chat/completions"
NO_LIMITS: dict[str, Any] = {
    "max_num_queued_reqs": 100, "max_header_bytes": 4000, "max_body_bytes": 10_000, "max_prompt_characters": None,
    "max_output_tokens": None, "request_timeout_s": None,
}  # fmt: skip
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


class Served:
    """A gateway around an app that answers like an engine, and what the app saw."""

    def __init__(self, keys: KeyStore | None = None, admin_elsewhere: bool = False, **limits: Any) -> None:
        self.admin_elsewhere = admin_elsewhere
        self.tracker, self.draining, self.seen = RequestTracker(write_log=True), False, dict[str, Any]()
        inner = self.inner = FastAPI()

        @inner.post(CHAT)
        async def chat(request: Request) -> Any:
            self.seen = {
                "body": await request.json(),
                "id": request.headers["x-request-id"],
                "priority": request.headers.getlist("x-vllm-priority"),
            }
            prompt = self.seen["body"]["messages"][0]["content"]
            if prompt == "busy":
                text = "The engine is currently busy and cannot accept new requests."
                return JSONResponse({"error": {"message": text, "code": 503}}, 503)
            if prompt == "wrong":
                return JSONResponse({"error": {"message": "no", "type": "BadRequestError", "code": 400}}, 400)
            if prompt == "late":
                await asyncio.sleep(0.2)
            if prompt == "slow":  # and never looks whether its client is still there
                await asyncio.sleep(30)
            if prompt == "patient":
                while not await request.is_disconnected():
                    await asyncio.sleep(0.01)
            if prompt == "crash":
                raise RuntimeError("broken")
            if prompt == "stream":
                return StreamingResponse(events(), media_type="text/event-stream")
            if prompt == "fails":
                return StreamingResponse(failing(), media_type="text/event-stream")
            self.tracker.engine_finished(f"chatcmpl-{self.seen['id']}", 10, 20)
            return {"choices": []}

        async def events() -> AsyncIterator[bytes]:
            yield b'data: {"n": 1}\n\n'
            await asyncio.sleep(30)

        async def failing() -> AsyncIterator[bytes]:
            yield b'data: {"n": 1}\n\n'
            yield b'data: {"error": {"message": "dead", "type": "EngineDeadError", "code": 500}}\n\n'
            yield b"data: [DONE]\n\n"

        @inner.post("/v1/responses")
        async def responses() -> Any:
            return StreamingResponse(breaking(), media_type="text/event-stream")

        async def breaking() -> AsyncIterator[bytes]:
            yield b'event: response.created\ndata: {"n": 1}\n\n'
            raise RuntimeError("broken")

        @inner.get("/metrics")
        async def metrics() -> str:
            return "numbers"

        @inner.post("/v1/responses/{response}/cancel")
        async def cancel(response: str) -> Any:
            return {"cancelled": response}

        @inner.post("/v1/invalid")
        async def invalid() -> None:
            raise HTTPException(422, "n: not a number")

        settings = NO_LIMITS | limits
        models = Models("tiny", {"tiny", "poet"}.__contains__)
        self.app = Gateway(
            inner, ServerLimits(**settings), keys, self.tracker, models,
            is_draining=lambda: self.draining, admin_elsewhere=self.admin_elsewhere,
        )  # fmt: skip
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test")

    async def chat(self, prompt: str = "hello", key: str = "", **changes: Any) -> httpx.Response:
        body = HELLO | {"messages": [{"role": "user", "content": prompt}]} | changes
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return await self.client.post(CHAT, json=body, headers=headers)


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    return error


async def test_without_keys_everybody_is_served_and_counted() -> None:
    served = Served()
    answer = await served.client.post(CHAT, json=HELLO, headers={"x-request-id": "mine-7"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (200, "mine-7")
    assert served.seen["id"] != "mine-7"
    assert served.tracker.tokens == {("anonymous", "prompt"): 10, ("anonymous", "generated"): 20}
    assert served.tracker.outcomes == {("anonymous", "ok"): 1}
    assert served.tracker.active == 0


async def test_the_gateways_own_time_has_neither_the_clients_nor_the_engines_in_it() -> None:
    async def slowly() -> AsyncIterator[bytes]:
        body = json.dumps(HELLO | {"messages": [{"role": "user", "content": "late"}]}).encode()
        for part in (body[:10], body[10:]):
            await asyncio.sleep(0.2)
            yield part

    served = Served()
    answer = await served.client.post(CHAT, content=slowly(), headers={"content-type": "application/json"})
    assert answer.status_code == 200
    await served.chat("wrong")
    (family,) = served.tracker.overhead.collect()
    found = {sample.name: sample.value for sample in family.samples}
    assert found["lowbit_gateway_overhead_seconds_count"] == 2
    assert 0 < found["lowbit_gateway_overhead_seconds_sum"] < 0.1


async def test_the_log_line_holds_no_prompt_and_no_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = Served(KeyStore(key_file(tmp_path / "k", {"name": "a"})))
    await served.chat("the secret plan", key="a-secret")
    (line,) = capsys.readouterr().err.strip().splitlines()
    record = json.loads(line)
    assert (record["key"], record["model"], record["status"], record["outcome"]) == ("a", "tiny", 200, "ok")
    assert (record["prompt_tokens"], record["generated_tokens"]) == (10, 20)
    assert "secret" not in line


async def test_a_missing_or_wrong_key_is_401(tmp_path: Path) -> None:
    served = Served(KeyStore(key_file(tmp_path / "k", {"name": "a"})))
    for key in ("", "b-secret", "a-secre"):
        answer = await served.chat(key=key)
        assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
    assert (await served.chat(key="a-secret")).status_code == 200
    assert served.tracker.rejections == {"key": 3}
    assert served.seen["body"] == HELLO


async def test_only_an_admin_reads_metrics_and_only_allowed_models_answer(tmp_path: Path) -> None:
    entries = {"name": "user", "models": ["other"]}, {"name": "boss", "admin": True}
    served = Served(KeyStore(key_file(tmp_path / "k", *entries)))
    statuses = []
    for name in ("user", "boss"):
        headers = {"authorization": f"Bearer {name}-secret"}
        statuses.append((await served.client.get("/metrics", headers=headers)).status_code)
    assert statuses == [403, 200]
    assert error_of(await served.chat(key="user-secret"))["code"] == "model_not_found"


async def test_a_key_has_its_requests_tokens_and_places(tmp_path: Path) -> None:
    entries = (
        {"name": "few", "requests_per_minute": 2},
        {"name": "short", "tokens_per_minute": 50},
        {"name": "one", "concurrent_requests": 1},
    )
    served = Served(KeyStore(key_file(tmp_path / "k", *entries)))
    answers = [await served.chat(key="few-secret") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "2"
    assert answers[0].headers["x-ratelimit-remaining-requests"] == "1"
    assert 25 <= int(answers[2].headers["retry-after"]) <= 30
    assert [(await served.chat(key="short-secret")).status_code for _ in range(2)] == [200, 200]
    assert (await served.chat(key="short-secret")).status_code == 429  # the engine counted 2 x 30
    waiting = asyncio.create_task(served.chat("slow", key="one-secret"))
    await asyncio.sleep(0.05)
    assert (await served.chat(key="one-secret")).status_code == 429
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert (await served.chat(key="one-secret")).status_code == 200


async def test_priority_is_the_keys_and_not_the_clients(tmp_path: Path) -> None:
    served = Served(KeyStore(key_file(tmp_path / "k", {"name": "vip", "priority": -5}, {"name": "b"})))
    await served.chat(key="vip-secret")
    assert served.seen["body"]["priority"] == -5
    await served.chat(key="b-secret", priority=-100)
    assert served.seen["body"]["priority"] == 0


async def test_a_priority_in_a_header_is_the_keys_too(tmp_path: Path) -> None:
    """vLLM follows `X-Vllm-Priority` before the body's field."""
    served = Served(KeyStore(key_file(tmp_path / "k", {"name": "vip", "priority": -5}, {"name": "b"})))
    for name, priority in (("vip", ["-5"]), ("b", ["0"])):
        headers = {"x-api-key": f"{name}-secret", "X-Vllm-Priority": "-100"}
        assert (await served.client.post(CHAT, json=HELLO, headers=headers)).status_code == 200
        assert served.seen["priority"] == priority
    plain = Served(KeyStore(key_file(tmp_path / "p", {"name": "a"})))
    await plain.client.post(CHAT, json=HELLO, headers={"x-api-key": "a-secret", "X-Vllm-Priority": "-100"})
    assert plain.seen["priority"] == []


async def test_a_priority_that_comes_with_a_new_key_file_counts_at_once(tmp_path: Path) -> None:
    now = [0.0]
    path = key_file(tmp_path / "k", {"name": "a"})
    served = Served(KeyStore(path, lambda: now[0]))
    await served.chat(key="a-secret", priority=-100)  # a client's own is never followed
    assert served.seen["body"]["priority"] == 0
    await served.chat(key="a-secret")
    assert "priority" not in served.seen["body"]
    key_file(path, {"name": "a", "priority": 5})
    now[0] = 10
    await served.chat(key="a-secret")
    assert served.seen["body"]["priority"] == 5


async def test_a_full_queue_is_429_with_a_time_to_come_back() -> None:
    served = Served()
    answer = await served.chat("busy")
    assert (answer.status_code, error_of(answer)["code"]) == (429, "rate_limit_exceeded")
    assert int(answer.headers["retry-after"]) >= 1
    assert served.tracker.outcomes == {("anonymous", "queue_full"): 1}


@pytest.mark.parametrize(
    ("request_of", "status"),
    [
        (lambda c: c.post(CHAT, content=b"{"), 415),
        (lambda c: c.post(CHAT, content=b"{", headers={"content-type": "application/json"}), 400),
        (lambda c: c.post(CHAT, content=b"[]", headers={"content-type": "application/json"}), 400),
        (lambda c: c.post(CHAT, json={"messages": "x" * 20_000}), 413),
        (lambda c: c.post("/v1/nothing", json={}), 404),
        (lambda c: c.put(CHAT), 405),
        (lambda c: c.post("/metrics"), 405),
        (lambda c: c.post("/v1/invalid", json={}), 400),
        (lambda c: c.post(CHAT, json=HELLO | {"messages": [{"content": "wrong"}]}), 400),
        (lambda c: c.post(CHAT, json=HELLO | {"messages": [{"content": "crash"}]}), 500),
    ],
)
async def test_every_error_has_openais_shape(
    request_of: Callable[[httpx.AsyncClient], Any], status: int
) -> None:
    answer = await request_of(Served().client)
    assert answer.status_code == status
    error_of(answer)
    assert answer.headers["x-request-id"]


async def test_more_output_than_allowed_is_refused() -> None:
    served = Served(max_output_tokens=100)
    assert (await served.chat(max_tokens=100)).status_code == 200
    assert error_of(await served.chat(max_completion_tokens=101))["code"] == "max_tokens_too_large"


async def test_a_model_is_known_or_404_and_none_means_the_default(tmp_path: Path) -> None:
    served = Served()
    assert (await served.chat(model="poet")).status_code == 200
    answer = await served.chat(model="other")
    assert (answer.status_code, error_of(answer)["code"]) == (404, "model_not_found")
    only = Served(KeyStore(key_file(tmp_path / "k", {"name": "a", "models": ["poet"]})))
    assert (await only.chat(key="a-secret", model="poet")).status_code == 200
    for model in ("tiny", "", None):
        assert (await only.chat(key="a-secret", model=model)).status_code == 403


async def test_cancelling_a_response_needs_no_body() -> None:
    assert (await Served().client.post("/v1/responses/resp_1/cancel")).json() == {"cancelled": "resp_1"}


async def test_prompts_and_heads_have_a_longest() -> None:
    served = Served(max_prompt_characters=200)
    assert (await served.chat("x" * 100)).status_code == 200
    assert error_of(await served.chat("x" * 200))["code"] == "context_length_exceeded"
    answer = await served.client.post(CHAT, json=HELLO, headers={"x-long": "y" * 4000})
    assert (answer.status_code, error_of(answer)["code"]) == (431, "request_header_too_large")


async def test_output_tokens_count_as_the_engine_will_read_them() -> None:
    served = Served(max_output_tokens=100)
    for value in ("101", 101.0, "1e3"):
        assert error_of(await served.chat(max_tokens=value))["code"] == "max_tokens_too_large"
    assert error_of(await served.chat(max_tokens=60, n=2))["code"] == "max_tokens_too_large"
    assert (await served.chat(max_tokens="ten")).status_code == 200  # vLLM's to refuse


async def test_a_full_server_refuses_before_it_reads_a_body() -> None:
    served = Served(max_num_queued_reqs=1)
    waiting = asyncio.create_task(served.chat("slow"))
    await asyncio.sleep(0.05)
    answer = await served.chat()
    assert (answer.status_code, error_of(answer)["code"]) == (429, "rate_limit_exceeded")
    assert int(answer.headers["retry-after"]) >= 1
    assert served.tracker.rejections == {"queue_full": 1}
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_admin_paths_may_have_a_port_of_their_own(tmp_path: Path) -> None:
    served = Served(KeyStore(key_file(tmp_path / "k", {"name": "boss", "admin": True})), admin_elsewhere=True)
    headers = {"authorization": "Bearer boss-secret"}
    assert (await served.client.get("/metrics", headers=headers)).status_code == 404
    transport = httpx.ASGITransport(AdminPort(served.inner))
    async with httpx.AsyncClient(transport=transport, base_url="http://admin") as admin:
        assert (await admin.get("/metrics")).status_code == 200
        assert error_of(await admin.post(CHAT, json=HELLO))["code"] == "not_found"


async def test_browsers_may_ask_from_the_allowed_origins_and_read_refusals(tmp_path: Path) -> None:
    served = Served(KeyStore(key_file(tmp_path / "k", {"name": "a"})))
    app = with_cors(served.app, ServeConfig(tmp_path, cors_origins=("https://a.example",)))
    assert with_cors(served.app, ServeConfig(tmp_path)) is served.app
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as browser:
        for origin, allowed in (("https://a.example", "https://a.example"), ("https://b.example", None)):
            asks = {"origin": origin, "access-control-request-method": "POST"}
            preflight = await browser.options(CHAT, headers=asks)
            assert preflight.headers.get("access-control-allow-origin") == allowed
            refused = await browser.post(CHAT, json=HELLO, headers={"origin": origin})
            assert refused.status_code == 401
            assert refused.headers.get("access-control-allow-origin") == allowed


async def test_the_deadline_ends_an_answer_before_and_within_a_stream() -> None:
    served = Served(request_timeout_s=0.1)
    answer = await served.chat("slow")
    assert (answer.status_code, error_of(answer)["code"]) == (504, "deadline_exceeded")
    stream = await served.chat("stream")
    events = stream.text.strip().split("\n\n")
    assert (stream.status_code, events[0]) == (200, 'data: {"n": 1}')
    assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert served.tracker.outcomes == {("anonymous", "deadline"): 2}
    longer = Served(request_timeout_s=60)
    hurried = await longer.client.post(
        CHAT, json=HELLO | {"messages": [{"content": "patient"}]}, headers={"x-request-timeout": "0.1"}
    )
    assert hurried.status_code == 504


async def test_a_stream_that_fails_ends_with_an_error_and_never_with_done() -> None:
    served = Served()
    first, last = (await served.chat("fails")).text.strip().split("\n\n")
    assert first == 'data: {"n": 1}'
    assert json.loads(last.removeprefix("data: "))["error"] == {
        "message": "dead", "type": "server_error", "param": None, "code": "internal_error",
    }  # fmt: skip
    assert served.tracker.outcomes == {("anonymous", "error"): 1}
    broken = (await served.client.post("/v1/responses", json={"input": "x"})).text.strip().split("\n\n")[1]
    event, data = broken.split("\ndata: ")
    assert (event, json.loads(data)["type"]) == ("event: error", "error")


async def test_a_draining_server_takes_no_new_work() -> None:
    served = Served()
    served.draining = True
    answer = await served.chat()
    assert (answer.status_code, answer.headers["connection"]) == (503, "close")
