"""Requests against the fake server, in this process: how they end, what is sent, what is counted."""

import asyncio
import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from tests.loadtest.conftest import HELLO, drive, jobs

from lowbit_core.errors import ConfigError
from lowbit_loadtest.generate import preflight
from lowbit_loadtest.generate.http.target import Target, open_http
from lowbit_loadtest.generate.records import Outcome, RequestRecord
from lowbit_loadtest.generate.schedule import Job, Turn
from lowbit_loadtest.report.summary import Run, Summary, steady_interval, summarize

if TYPE_CHECKING:
    from tests.loadtest.conftest import FakeServer

ENDINGS: list[tuple[dict[str, Any], Outcome, str]] = [
    ({}, Outcome.COMPLETED, ""),
    ({"finish_reason": "length"}, Outcome.COMPLETED, ""),
    ({"status": 429}, Outcome.REJECTED, "status 429: no room"),
    ({"status": 503}, Outcome.REJECTED, "status 503: no room"),
    ({"status": 400}, Outcome.FAILED, "status 400: no room"),
    ({"status": 500}, Outcome.FAILED, "status 500: no room"),
    ({"raw_event": '{"error": {"message": "engine died"}}'}, Outcome.FAILED, "error event: engine died"),
    ({"raw_event": "{broken"}, Outcome.FAILED, "not of /v1/chat/completions: {broken"),
    (
        {"raw_event": '{"choices": [null]}'},
        Outcome.FAILED,
        'not of /v1/chat/completions: {"choices": [null]}',
    ),
    ({"finish_reason": "abort"}, Outcome.FAILED, "finish_reason abort"),
    ({"finish_reason": None}, Outcome.CUT_OFF, "[DONE] without finish_reason"),
    ({"done": False}, Outcome.CUT_OFF, "the stream ended without [DONE]"),
    ({"drops_connection": True}, Outcome.CUT_OFF, "RemoteProtocolError"),
    ({"hangs": True}, Outcome.TIMED_OUT, "no end within 0.5 s"),
]


def run(
    fake: "FakeServer", requests: int = 4, streams: int = 1, **settings: Any
) -> tuple[RequestRecord, ...]:
    share_jobs = settings.pop("jobs", jobs(requests))
    return drive(settings.pop("url", fake.url), share_jobs, streams=streams, **settings).records


def summary_of(records: tuple[RequestRecord, ...], streams: int = 1) -> Summary:
    return summarize([Run(records, steady_interval(records, streams), closed=True)])


@pytest.mark.parametrize(("reply", "outcome", "detail"), ENDINGS)
def test_every_ending_has_its_outcome(
    fake_server: "FakeServer", reply: dict[str, Any], outcome: Outcome, detail: str
) -> None:
    fake_server.script(**reply)
    (record,) = run(fake_server, 1, timeout_s=0.5 if outcome is Outcome.TIMED_OUT else 30.0)
    assert record.outcome is outcome
    assert record.detail.startswith(detail)
    assert record.sent_s < record.ended_s


def test_outcomes_add_up_to_the_requests(fake_server: "FakeServer") -> None:
    for reply, _, _ in ENDINGS * 2:
        fake_server.script(**reply)
    summary = summary_of(run(fake_server, 60, 5, timeout_s=2.0))
    expected = {outcome.value: 2 * sum(ending[1] is outcome for ending in ENDINGS) for outcome in Outcome}
    expected["completed"] += 60 - 2 * len(ENDINGS)
    assert summary.outcomes == expected
    assert sum(summary.outcomes.values()) == summary.requests == 60


def test_a_server_that_goes_away_during_the_run_makes_failures() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "gone"}]})
        raise httpx.ConnectError("refused")

    records = drive("http://fake", jobs(4), streams=1, transport=httpx.MockTransport(answer)).records
    summary = summary_of(records)
    assert summary.outcomes["failed"] == 4
    assert summary.details == {"ConnectError: refused": 4}


def test_output_tokens_are_the_servers_count_and_not_chunks(fake_server: "FakeServer") -> None:
    for _ in range(8):
        fake_server.script(chunks=5, tokens_per_chunk=3)
    summary = summary_of(run(fake_server, 8, 2))
    assert summary.output_tokens == fake_server.output_tokens == 8 * 15
    assert summary.output_tokens_per_chunk == 3.0
    assert summary.prompt_tokens == 8 * 7


def test_token_rate_agrees_with_the_servers_total_over_the_run(fake_server: "FakeServer") -> None:
    for _ in range(20):
        fake_server.script(first_chunk_delay_s=0.02)
    summary = summary_of(run(fake_server, 20))
    assert summary.output_tokens_per_s == pytest.approx(
        fake_server.output_tokens / summary.duration_s, rel=0.01
    )


def test_a_later_turn_carries_the_tools_and_what_its_answer_must_have(fake_server: "FakeServer") -> None:
    """A tool's result refers to a call by its id; the fake's answers call nothing, so the plan's call is carried."""
    call = {"id": "call-0", "type": "function", "function": {"name": "run", "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": "call-0", "content": "7"}
    tools: tuple[dict[str, Any], ...] = ({"type": "function", "function": {"name": "run"}},)
    turns = (Turn(HELLO, 8, answer={"tool_calls": [call]}), Turn((result,), 8))
    run(fake_server, jobs=(Job(0, None, turns, 0, tools),))
    first, second = fake_server.bodies
    assert first["tools"] == second["tools"] == list(tools)
    answer = {"role": "assistant", "content": "word " * 4, "tool_calls": [call]}
    assert second["messages"] == [*HELLO, answer, result]


@pytest.mark.parametrize(
    ("details", "cached"), [({"cached_tokens": 5}, 5), ({"cached_tokens": None}, None), (None, None)]
)
def test_cached_prompt_tokens_are_what_the_server_says(
    fake_server: "FakeServer", details: dict[str, Any] | None, cached: int | None
) -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 4, "prompt_tokens_details": details}
    fake_server.script(usage=False, raw_event=json.dumps({"choices": [], "usage": usage}))
    assert run(fake_server, 1)[0].cached_tokens == cached


def test_answers_without_usage_leave_the_token_rate_unknown(fake_server: "FakeServer") -> None:
    fake_server.script(usage=False)
    summary = summary_of(run(fake_server))
    assert summary.outcomes["completed"] == 4
    assert (summary.completed_without_usage, summary.output_tokens_per_s) == (1, None)


def test_first_token_is_the_first_with_output_and_not_the_role(fake_server: "FakeServer") -> None:
    fake_server.script(first_chunk_delay_s=0.1)
    (record,) = run(fake_server, 1)
    assert record.chunk_times_s[0] - record.sent_s >= 0.1
    assert len(record.chunk_times_s) == 4


def test_unescaped_line_separators_in_an_answer_do_not_break_the_stream(fake_server: "FakeServer") -> None:
    fake_server.script(content="a\u2028b\u2029c\x85d")
    assert run(fake_server, 1)[0].outcome is Outcome.COMPLETED


def test_concurrency_is_reached_and_never_passed_on_as_many_connections(fake_server: "FakeServer") -> None:
    for _ in range(40):
        fake_server.script(first_chunk_delay_s=0.02)
    run(fake_server, 40, 5)
    assert fake_server.most_in_flight == 5
    assert len(fake_server.connections) == 5


def test_more_than_a_hundred_streams_run_at_once(fake_server: "FakeServer") -> None:
    for _ in range(120):
        fake_server.script(first_chunk_delay_s=1.0)
    run(fake_server, 120, 120)
    assert fake_server.most_in_flight == 120


def test_requests_carry_the_sampling_options_and_take_the_prompts_in_turn(fake_server: "FakeServer") -> None:
    prompts = tuple(({"role": "user", "content": text},) for text in ("one", "two", "three"))
    run(fake_server, jobs=jobs(4, prompts, max_tokens=9, seed=100), temperature=0.5)
    assert [body["messages"][0]["content"] for body in fake_server.bodies] == ["one", "two", "three", "one"]
    assert [body["seed"] for body in fake_server.bodies] == [100, 101, 102, 103]
    for body in fake_server.bodies:
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("fake-model", 9, 0.5)
        assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_target_may_end_with_v1_or_a_slash(fake_server: "FakeServer", suffix: str) -> None:
    assert all(one.outcome is Outcome.COMPLETED for one in run(fake_server, url=fake_server.url + suffix))


def test_api_key_is_sent(fake_server: "FakeServer") -> None:
    fake_server.api_key = "secret"
    assert all(one.outcome is Outcome.COMPLETED for one in run(fake_server, api_key="secret"))


def find_model(url: str, wanted: str | None = None, api_key: str | None = None) -> str:
    async def find() -> str:
        target = Target(url, wanted or "", api_key, timeout_s=1.0)
        async with open_http(target) as http:
            return await preflight.find_model(http, target)

    return asyncio.run(find())


def test_the_first_model_is_taken_unless_one_is_named(fake_server: "FakeServer") -> None:
    assert find_model(fake_server.url) == "fake-model"
    assert find_model(fake_server.url, "fake-adapter") == "fake-adapter"


def test_wrong_target_is_refused_before_a_request_is_sent(fake_server: "FakeServer") -> None:
    with pytest.raises(
        ConfigError, match=r"--model 'other' is not served at .*served are: fake-model, fake-adapter"
    ):
        find_model(fake_server.url, "other")
    with pytest.raises(ConfigError, match=r"lists no model at /nowhere/v1/models \(status 404\)"):
        find_model(f"{fake_server.url}/nowhere")
    fake_server.api_key = "secret"
    with pytest.raises(ConfigError, match="refuses the API key"):
        find_model(fake_server.url, api_key="wrong")
    with pytest.raises(ConfigError, match="does not answer"):
        find_model("http://127.0.0.1:9")
    assert [body["model"] for body in fake_server.bodies] == [
        "other"
    ]  # whether it is an adapter that is not listed


def test_a_loop_that_repeats_its_jobs_never_repeats_a_seed(fake_server: "FakeServer") -> None:
    records = run(fake_server, jobs=jobs(3), streams=2, repeats=True, length_s=0.3)
    assert len(records) > 6
    seeds = [body["seed"] for body in fake_server.bodies]
    assert sorted(seeds) == list(range(len(records)))
