"""Whole runs against the fake server: how requests end, what is sent, what is counted."""

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from lowbit_core.errors import ConfigError
from lowbit_loadtest.client import sse_data
from lowbit_loadtest.metrics import Outcome, RequestRecord
from lowbit_loadtest.runner import Options, Result, run_load_test

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.loadtest.conftest import FakeServer

HELLO = ({"role": "user", "content": "Hello"},)

ENDINGS: list[tuple[dict[str, Any], Outcome, str]] = [
    ({}, Outcome.COMPLETED, ""),
    ({"finish_reason": "length"}, Outcome.COMPLETED, ""),
    ({"status": 429}, Outcome.REJECTED, "status 429: no room"),
    ({"status": 503}, Outcome.REJECTED, "status 503: no room"),
    ({"status": 400}, Outcome.FAILED, "status 400: no room"),
    ({"status": 500}, Outcome.FAILED, "status 500: no room"),
    ({"raw_event": '{"error": {"message": "engine died"}}'}, Outcome.FAILED, "error event: engine died"),
    ({"raw_event": "{broken"}, Outcome.FAILED, "not a chat completion chunk: {broken"),
    (
        {"raw_event": '{"choices": [null]}'},
        Outcome.FAILED,
        'not a chat completion chunk: {"choices": [null]}',
    ),
    ({"finish_reason": "abort"}, Outcome.FAILED, "finish_reason abort"),
    ({"finish_reason": None}, Outcome.CUT_OFF, "[DONE] without finish_reason"),
    ({"done": False}, Outcome.CUT_OFF, "the stream ended without [DONE]"),
    ({"drops_connection": True}, Outcome.CUT_OFF, "RemoteProtocolError"),
    ({"hangs": True}, Outcome.TIMED_OUT, "no end within 0.5 s"),
]


def options(fake: "FakeServer", **changes: Any) -> Options:
    return replace(Options(target=fake.url, prompts=(HELLO,), concurrency=1, requests=4), **changes)


def run(chosen: Options) -> Result:
    seen: list[RequestRecord] = []
    result = asyncio.run(run_load_test(chosen, seen.append))
    assert tuple(seen) == result.records
    return result


@pytest.mark.parametrize(("reply", "outcome", "detail"), ENDINGS)
def test_every_ending_has_its_outcome(
    fake_server: "FakeServer", reply: dict[str, Any], outcome: Outcome, detail: str
) -> None:
    fake_server.script(**reply)
    (record,) = run(options(fake_server, requests=1, timeout_s=0.5)).records
    assert record.outcome is outcome
    assert record.detail.startswith(detail)
    assert record.sent_s < record.ended_s


def test_outcomes_add_up_to_the_requests(fake_server: "FakeServer") -> None:
    for reply, _, _ in ENDINGS * 2:
        fake_server.script(**reply)
    summary = run(options(fake_server, concurrency=5, requests=60, timeout_s=0.5)).summary
    expected = {outcome.value: 2 * sum(ending[1] is outcome for ending in ENDINGS) for outcome in Outcome}
    expected["completed"] += 60 - 2 * len(ENDINGS)
    assert summary.outcomes == expected
    assert sum(summary.outcomes.values()) == summary.requests == 60


def test_a_server_that_goes_away_during_the_run_makes_failures() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "gone"}]})
        raise httpx.ConnectError("refused")

    chosen = Options(target="http://fake", prompts=(HELLO,), requests=4)
    transport = httpx.MockTransport(answer)
    summary = asyncio.run(run_load_test(chosen, lambda record: None, transport)).summary
    assert summary.outcomes["failed"] == 4
    assert summary.details == {"ConnectError: refused": 4}


def test_output_tokens_are_the_servers_count_and_not_chunks(fake_server: "FakeServer") -> None:
    for _ in range(8):
        fake_server.script(chunks=5, tokens_per_chunk=3)
    summary = run(options(fake_server, concurrency=2, requests=8)).summary
    assert summary.output_tokens == fake_server.output_tokens == 8 * 15
    assert summary.output_tokens_per_chunk == 3.0
    assert summary.prompt_tokens == 8 * 7


def test_token_rate_agrees_with_the_servers_total_over_the_run(fake_server: "FakeServer") -> None:
    for _ in range(20):
        fake_server.script(first_chunk_delay_s=0.02)
    summary = run(options(fake_server, requests=20)).summary
    assert summary.output_tokens_per_s == pytest.approx(
        fake_server.output_tokens / summary.duration_s, rel=0.01
    )


def test_answers_without_usage_leave_the_token_rate_unknown(fake_server: "FakeServer") -> None:
    fake_server.script(usage=False)
    summary = run(options(fake_server)).summary
    assert summary.outcomes["completed"] == 4
    assert (summary.completed_without_usage, summary.output_tokens_per_s) == (1, None)


def test_first_token_is_the_first_with_output_and_not_the_role(fake_server: "FakeServer") -> None:
    fake_server.script(first_chunk_delay_s=0.1)
    (record,) = run(options(fake_server, requests=1)).records
    assert record.chunk_times_s[0] - record.sent_s >= 0.1
    assert len(record.chunk_times_s) == 4


def test_unescaped_line_separators_in_an_answer_do_not_break_the_stream(fake_server: "FakeServer") -> None:
    fake_server.script(content="a\u2028b\u2029c\x85d")
    assert run(options(fake_server, requests=1)).summary.outcomes["completed"] == 1


def test_events_survive_any_split_into_chunks() -> None:
    body = (
        'data: {"a": "ü"}\r\n\r\n: comment\ndata: one\ndata: two\n\ndata:[DONE]\n\ndata: cut off\n'.encode()
    )

    async def pieces(size: int) -> "AsyncIterator[bytes]":
        for start in range(0, len(body), size):
            yield body[start : start + size]

    async def read(size: int) -> list[str]:
        return [data async for data in sse_data(pieces(size))]

    for size in range(1, len(body) + 1):
        assert asyncio.run(read(size)) == ['{"a": "ü"}', "one\ntwo", "[DONE]"]


def test_concurrency_is_reached_and_never_passed_on_as_many_connections(fake_server: "FakeServer") -> None:
    for _ in range(40):
        fake_server.script(first_chunk_delay_s=0.02)
    run(options(fake_server, concurrency=5, requests=40))
    assert fake_server.most_in_flight == 5
    assert len(fake_server.connections) == 5


def test_more_than_a_hundred_streams_run_at_once(fake_server: "FakeServer") -> None:
    for _ in range(120):
        fake_server.script(first_chunk_delay_s=1.0)
    run(options(fake_server, concurrency=120, requests=120))
    assert fake_server.most_in_flight == 120


def test_requests_carry_the_sampling_options_and_take_the_prompts_in_turn(fake_server: "FakeServer") -> None:
    prompts = tuple(({"role": "user", "content": text},) for text in ("one", "two", "three"))
    run(options(fake_server, prompts=prompts, requests=4, max_tokens=9, temperature=0.5, seed=100))
    assert [body["messages"][0]["content"] for body in fake_server.bodies] == ["one", "two", "three", "one"]
    assert [body["seed"] for body in fake_server.bodies] == [100, 101, 102, 103]
    for body in fake_server.bodies:
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("fake-model", 9, 0.5)
        assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_target_may_end_with_v1_or_a_slash(fake_server: "FakeServer", suffix: str) -> None:
    assert run(options(fake_server, target=fake_server.url + suffix)).summary.outcomes["completed"] == 4


def test_a_named_model_is_used(fake_server: "FakeServer") -> None:
    assert run(options(fake_server, model="fake-adapter")).model == "fake-adapter"
    assert {body["model"] for body in fake_server.bodies} == {"fake-adapter"}


def test_api_key_is_sent(fake_server: "FakeServer") -> None:
    fake_server.api_key = "secret"
    assert run(options(fake_server, api_key="secret")).summary.outcomes["completed"] == 4


def test_wrong_input_is_refused_before_a_request_is_sent(fake_server: "FakeServer") -> None:
    with pytest.raises(
        ConfigError, match=r"--model 'other' is not served at .*served are: fake-model, fake-adapter"
    ):
        run(options(fake_server, model="other"))
    with pytest.raises(ConfigError, match="lists no model at /v1/models"):
        run(options(fake_server, target=f"{fake_server.url}/nowhere"))
    fake_server.api_key = "secret"
    with pytest.raises(ConfigError, match="refuses the API key"):
        run(options(fake_server, api_key="wrong"))
    with pytest.raises(ConfigError, match="does not answer"):
        run(options(fake_server, target="http://127.0.0.1:9"))
    assert fake_server.bodies == []
