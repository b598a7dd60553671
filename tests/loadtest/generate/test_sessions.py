"""Sessions: agents and conversations, whose requests wait for one another, and the numbers of a session."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.loadtest.conftest import drive
from tests.loadtest.generate.virtual_time import drive_virtually

from lowbit_core.errors import ConfigError
from lowbit_loadtest.generate.arrivals import Draw, draw_seconds, generator
from lowbit_loadtest.generate.planner import make_schedule
from lowbit_loadtest.generate.records import Outcome, RequestRecord
from lowbit_loadtest.generate.schedule import Schedule
from lowbit_loadtest.generate.tokens import WordTokens
from lowbit_loadtest.measured import Measured, Sent, make_point
from lowbit_loadtest.report.sessions import sessions_of
from lowbit_loadtest.report.summary import Run
from lowbit_loadtest.report.text import session_lines
from lowbit_loadtest.scenario import SLO, parse_scenario
from lowbit_loadtest.sections.distributions import Seconds

if TYPE_CHECKING:
    from tests.loadtest.conftest import FakeServer

AGENTIC: dict[str, Any] = {
    "kind": "agentic", "steps": 3, "task_tokens": 5, "result_tokens": {"kind": "uniform", "min": 2, "max": 9},
    "tool_s": {"kind": "uniform", "min": 0.5, "max": 2.5},
}  # fmt: skip


def planned(prompts: dict[str, Any], **data: Any) -> Schedule:
    base = {"arrivals": {"kind": "constant", "rate_rps": 1}, "requests": 4}
    return asyncio.run(
        make_schedule(parse_scenario({**base, "prompts": prompts, **data}, "test"), WordTokens())
    )


def words(message: dict[str, Any]) -> int:
    return len(message["content"].split())


def test_an_agent_has_a_task_and_then_results_with_seeded_lengths_and_times() -> None:
    one, again, other = planned(AGENTIC), planned(AGENTIC), planned(AGENTIC, seed=1)
    assert one == again
    assert {turn.pause_s for job in one.jobs for turn in job.turns[1:]}.isdisjoint(
        turn.pause_s for job in other.jobs for turn in job.turns[1:]
    )
    for job in one.jobs:
        first, *later = job.turns
        assert (first.pause_s, words(first.messages[0])) == (0, 5)
        assert all(0.5 <= turn.pause_s <= 2.5 and 2 <= words(turn.messages[0]) <= 9 for turn in later)
        assert all(turn.messages[0]["role"] == "user" and turn.answer is None for turn in job.turns)
    assert one.requests == 12


def test_with_tools_each_answer_calls_one_and_its_result_names_the_call() -> None:
    job = planned({**AGENTIC, "tools": 2, "shared_prefix": {"groups": 1, "tokens": 7}}).jobs[0]
    names = [tool["function"]["name"] for tool in job.tools]
    assert names == ["tool_0", "tool_1"]
    assert [message["role"] for message in job.turns[0].messages] == ["system", "user"]
    for before, turn in zip(job.turns, job.turns[1:], strict=False):
        assert before.answer is not None
        (call,) = before.answer["tool_calls"]
        assert call["function"]["name"] in names
        assert (turn.messages[0]["role"], turn.messages[0]["tool_call_id"]) == ("tool", call["id"])
    assert job.turns[-1].answer is None


def test_tools_of_an_agent_and_its_prefix_are_on_the_wire_and_grow(fake_server: "FakeServer") -> None:
    prompts = {**AGENTIC, "tools": 1, "tool_s": 0.01}
    schedule = planned(prompts, requests=1)
    result = drive(fake_server.url, tuple(replace(job, at_s=0.0) for job in schedule.jobs))
    assert [record.outcome for record in result.records] == [Outcome.COMPLETED] * 3
    first, second, third = (body["messages"] for body in fake_server.bodies)
    assert second[: len(first)] == first
    assert third[: len(second)] == second
    assert [message["role"] for message in third] == ["user", "assistant", "tool", "assistant", "tool"]
    assert all(body["tools"] == list(schedule.jobs[0].tools) for body in fake_server.bodies)


def test_a_turn_waits_for_the_answer_and_then_for_the_tool() -> None:
    schedule = planned(AGENTIC)
    driven = drive_virtually(schedule.jobs, lambda index, now: 0.3, gap_s=0.1, chunks=4)
    for job in schedule.jobs:
        records = sorted((one for one in driven.records if one.index == job.index), key=lambda one: one.turn)
        assert [one.turn for one in records] == [0, 1, 2]
        for before, record, turn in zip(records, records[1:], job.turns[1:], strict=False):
            assert record.due_s == pytest.approx(before.ended_s + turn.pause_s)
    sessions = sessions_of([Run(driven.records, None)], SLO())
    pauses_s = [sum(turn.pause_s for turn in job.turns) for job in schedule.jobs]
    assert sessions.time_to_finish_s is not None
    assert sessions.waiting_s is not None
    assert sessions.time_to_finish_s.mean - sessions.waiting_s.mean == pytest.approx(
        np.mean(pauses_s), abs=0.01
    )


def record(index: int, turn: int, at_s: float, **changes: Any) -> RequestRecord:
    """A turn of a session of two, a second long: 100 tokens and 50 more each turn."""
    fields: dict[str, Any] = {
        "outcome": Outcome.COMPLETED, "sent_s": at_s, "ended_s": at_s + 1, "intended_s": at_s, "index": index,
        "turn": turn, "turns": 2, "prompt_tokens": 100 + 50 * turn, "output_tokens": 20,
        "cached_tokens": [0, 96][turn],
    }  # fmt: skip
    return RequestRecord(**{**fields, **changes})


def whole(*records: RequestRecord) -> Sequence[Run]:
    return [Run(tuple(sorted(records, key=lambda one: one.due_s)), None)]


def test_sessions_have_their_time_their_cache_and_their_goodput() -> None:
    """They take 5 s and 9 s; the third fails, the fourth was not sent to its end, the fifth is warm-up."""
    runs = whole(
        record(0, 0, 0.0), record(0, 1, 4.0), record(1, 0, 1.0), record(1, 1, 9.0),
        record(2, 0, 2.0), record(2, 1, 3.0, outcome=Outcome.FAILED, cached_tokens=None),
        record(3, 0, 3.0), record(4, 0, 0.5, warm_up=True), record(4, 1, 6.0, warm_up=True),
    )  # fmt: skip
    found = sessions_of(runs, SLO(session_s=6))
    assert (found.sessions, found.finished) == (4, 2)
    assert found.time_to_finish_s is not None
    assert (found.time_to_finish_s.count, found.time_to_finish_s.mean) == (2, 7.0)
    assert found.waiting_s is not None
    assert found.waiting_s.mean == 2.0
    assert found.cached_prefix_share == pytest.approx(96 / 120)  # of 100 tokens asked and 20 answered
    assert found.cached_prompt_share == pytest.approx(2 * 96 / (4 * 100 + 2 * 150))
    assert found.attainment == 0.25
    assert found.goodput_per_s == pytest.approx(1 / 10)
    text = " ".join(session_lines(found))
    assert "2 of 4 sessions finished, 25.0% within 6 s; goodput 0.1 sessions/s" in text
    assert "of the prefix 80.0%" in text


def test_a_server_that_does_not_say_what_it_cached_has_no_share() -> None:
    found = sessions_of(
        whole(record(0, 0, 0, cached_tokens=None), record(0, 1, 3, cached_tokens=None)), SLO()
    )
    assert (found.cached_prompt_share, found.cached_prefix_share) == (None, None)
    assert (found.attainment, found.goodput_per_s) == (None, None)


def test_more_in_cache_than_the_session_had_is_not_counted_as_its_prefix() -> None:
    """Another session's tokens, or the template's: the share stays at most 1."""
    found = sessions_of(whole(record(0, 0, 0), record(0, 1, 3, cached_tokens=150)), SLO())
    assert found.cached_prefix_share == 1.0


@pytest.mark.parametrize(("deadline_s", "meets"), [(9.5, True), (6.0, False)])
def test_the_deadline_of_sessions_is_an_slo(deadline_s: float, meets: bool) -> None:
    scenario = parse_scenario(
        {
            "arrivals": {"kind": "constant", "rate_rps": 1}, "prompts": AGENTIC, "requests": 2,
            "slo": {"session_s": deadline_s, "attainment": 0.9},
        },
        "test",
    )  # fmt: skip
    records = tuple(one for run in whole(record(0, 0, 0.0), record(0, 1, 4.0), record(1, 0, 1.0), record(1, 1, 9.0))
                    for one in run.records)  # fmt: skip
    point = make_point(scenario, Measured({}, 1.0, ((Sent(records, 0.0, 0.0, "", 4, None, None),),)))
    assert point.meets(scenario) is meets


def test_single_requests_are_no_sessions() -> None:
    single = tuple(record(index, 0, float(index), turns=1) for index in range(3))
    scenario = parse_scenario(
        {"arrivals": {"kind": "constant", "rate_rps": 1}, "prompts": {"kind": "text"}, "requests": 3}, "test"
    )
    assert (
        make_point(scenario, Measured({}, 1.0, ((Sent(single, 0.0, 0.0, "", 3, None, None),),))).sessions
        is None
    )


@pytest.mark.parametrize(
    ("seconds", "mean", "sd"),
    [
        ({"kind": "lognormal", "mean": 2, "sd": 1}, 2, 1),
        ({"kind": "normal", "mean": 5, "sd": 0.5}, 5, 0.5),
        ({"kind": "uniform", "min": 0, "max": 3}, 1.5, 3 / 12**0.5),
        ({"mean": 0}, 0, 0),
    ],
)
def test_times_follow_their_distribution(seconds: dict[str, Any], mean: float, sd: float) -> None:
    drawn = draw_seconds(Seconds.model_validate(seconds), generator(Draw.PAUSES, 0), 20_000)
    assert np.mean(drawn) == pytest.approx(mean, rel=0.03, abs=1e-9)
    assert np.std(drawn) == pytest.approx(sd, rel=0.05, abs=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tool_s": -1}, r"prompts.tool_s.mean = -1: allowed is 0.0 or more"),
        ({"tool_s": {"kind": "lognormal", "mean": 0, "sd": 1}}, "lognormal takes a mean above 0"),
        ({"tool_s": {"kind": "uniform", "min": 3, "max": 1}}, "min 3 is above max 1"),
        ({"result_tokns": 3}, r"unknown key 'prompts.result_tokns'; did you mean result_tokens\?"),
        ({"tools": 129}, "prompts.tools = 129: allowed is 128 or less"),
    ],
)
def test_a_wrong_agent_is_refused_with_its_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned({**AGENTIC, **changes})
