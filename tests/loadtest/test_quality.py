"""Quality under load, against a stand-in that scores by rule: what it says, what it hides, and what it cannot do."""

import asyncio
import json
import re
import time
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.loadtest.conftest import FakeServer, Receive, Send, serve_fake

from lowbit_core.errors import ConfigError
from lowbit_core.evals.arithmetic import Estimate
from lowbit_core.evals.items import Request
from lowbit_loadtest.generate.http.target import Target, open_http
from lowbit_loadtest.generate.records import Interval, Outcome, RequestRecord
from lowbit_loadtest.generate.workers import OnTally
from lowbit_loadtest.quality.probes import fits, judge, make_probes, repeats
from lowbit_loadtest.quality.questions import read_items
from lowbit_loadtest.quality.run import measure_quality
from lowbit_loadtest.quality.scorer import Scorer, Unsupported, find_scorer
from lowbit_loadtest.quality.verdict import QualityResult, base_answers, judge_change, share_under_load
from lowbit_loadtest.report.document import as_document
from lowbit_loadtest.report.page import as_html
from lowbit_loadtest.report.text import lines
from lowbit_loadtest.runner import run_load_test
from lowbit_loadtest.scenario import Scenario, parse_scenario

LIKELY = -0.5  # of words that the stand-in knows, others are at -3
KNOWN = ("right", "known", "words")


@dataclass
class ScoringServer(FakeServer):
    """Also echoes prompts with log-probabilities, one token a word. `spoils_under_load`: it forgets while it chats."""

    has_tokenize: bool = True
    refuses: str = ""  # completions | echo
    most_logprobs: int = 20
    spoils_under_load: bool = False
    loses: tuple[int, ...] = ()  # these scored requests are answered 500
    tokens: list[str] = field(default_factory=lambda: ["<first>"])
    scored: int = 0
    chatted_s: float = float("-inf")  # a load pauses between its requests, on a busy machine for long

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in ("/tokenize", "/v1/completions"):
            body = json.loads((await receive())["body"])
            if scope["path"] == "/tokenize" and "prompt" in body and self.has_tokenize:
                await _json(send, 200, {"tokens": self.encode(body["prompt"])})
            elif scope["path"] == "/v1/completions":
                await _json(send, *await self.complete(body))
            else:
                await _json(send, 404, {"detail": "Not Found"})
        else:
            if not self.replies:
                self.script(first_chunk_delay_s=0.1)
            await super().__call__(scope, receive, send)
            self.chatted_s = time.monotonic()

    def encode(self, text: str) -> list[int]:
        words = re.findall(r"\s*\S+|\s+$", text)
        self.tokens += [word for word in dict.fromkeys(words) if word not in self.tokens]
        return [self.tokens.index(word) for word in words]

    async def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if self.refuses == "completions" or body["logprobs"] > self.most_logprobs:
            return 400, {"error": {"message": f"at most {self.most_logprobs} logprobs"}}
        await asyncio.sleep(0.01)
        self.scored += 1
        if self.scored in self.loses:
            return 500, {"error": {"message": "lost"}}
        prompt = body["prompt"]
        ids = prompt if isinstance(prompt, list) else self.encode(prompt)
        words = [self.tokens[one] for one in ids] + ["."]
        if self.refuses == "echo":
            words = ["."]
        values = [None, *(self.logprob(word) for word in words[1:])]
        offsets = [sum(map(len, words[:position])) for position in range(len(words))]
        tops = [
            None if value is None else {word: value, "other": -1.0}
            for word, value in zip(words, values, strict=True)
        ]
        logprobs = {"tokens": words, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
        return 200, {"choices": [{"text": "", "logprobs": logprobs}]}

    def logprob(self, word: str) -> float:
        is_loaded = self.in_flight > 0 or time.monotonic() - self.chatted_s < 2
        spoiled = self.spoils_under_load and is_loaded
        return -3.0 if spoiled or word.strip() not in KNOWN else LIKELY


async def _json(send: Send, status: int, body: object) -> None:
    await send(
        {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]}
    )
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


@pytest.fixture
def server() -> Iterator[ScoringServer]:
    yield from serve_fake(ScoringServer())


@pytest.fixture
def own_items(tmp_path: Path) -> str:
    """Thirty questions that are right while words are known; two that are always wrong; a cloze."""
    rows: list[dict[str, Any]] = [
        {"context": f"question {n}", "choices": [" right", " wrongs"], "gold": 0, "id": f"q{n}"}
        for n in range(30)
    ]
    rows += [
        {"context": "no", "choices": [" right", " wrongs"], "gold": 1, "id": f"bad{n}"} for n in range(2)
    ]
    rows += [{"context": "so it", "choices": [" known words"], "task": "cloze"}]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def load_scenario_with(items: str, **quality: Any) -> Scenario:
    return parse_scenario(
        {
            "arrivals": {"kind": "closed", "concurrency": 2},
            "prompts": {"kind": "text"},
            "requests": 4,
            "generator": {"workers": 1},
            "quality": {
                "tasks": [],
                "items_file": items,
                "probes": 3,
                "tolerance": 0.1,
                "concurrency": 4,
                **quality,
            },
        },
        "test",
    )


def run(server: ScoringServer, items: str, base: Any = None, **quality: Any) -> QualityResult:
    """Ask idle, then under the scenario's load."""
    scenario = load_scenario_with(items, **quality)
    assert scenario.quality is not None
    target = Target(server.url, "fake-model")
    found = measure_quality(scenario, read_items(scenario.quality), target, 1, quiet, base)
    assert found is not None
    return found


def quiet(title: str, requests: int | None) -> OnTally:
    return lambda tally: None


def json_answer(**changes: Any) -> str:
    return json.dumps({"name": "Ada", "year": 1815, "field": "sums"} | changes)


def test_quality_passes_where_the_server_answers_the_same_under_load(
    server: ScoringServer, own_items: str
) -> None:
    scenario = load_scenario_with(own_items)
    result = run_load_test(scenario, Target(server.url), quiet)
    quality = result.quality
    assert quality is not None
    assert quality.right_answers is not None
    assert (
        quality.right_answers.verdict,
        quality.right_answers.change.value,
        quality.right_answers.judged,
    ) == ("pass", 0.0, 36)
    own, cloze = (quality.tasks[task][0].acc_norm for task in ("own", "cloze"))
    assert own is not None
    assert cloze is not None
    assert (own.value, cloze.value) == (30 / 32, 1.0)
    assert quality.under_load.flips == 0
    assert quality.load["requests"] > 0
    assert quality.under_load_share > 0.9
    document = as_document(scenario, result, "now", requests=True)
    assert base_answers(json.loads(json.dumps(document)), "a.json") == dict(quality.loaded.answers)
    assert any("quality under load: pass" in line for line in lines(scenario, result))
    assert "quality under load: pass" in as_html(document)


def test_quality_is_asked_under_agents_whose_sessions_grow(server: ScoringServer, own_items: str) -> None:
    agents = {"kind": "agentic", "steps": 3, "task_tokens": 4, "result_tokens": 3, "tool_s": 0.01}
    prompts = parse_scenario(
        {"arrivals": {"kind": "closed", "concurrency": 1}, "prompts": agents, "requests": 1}, "test"
    ).prompts
    scenario = load_scenario_with(own_items, probes=0).model_copy(update={"prompts": prompts})
    assert scenario.quality is not None
    target = Target(server.url, "fake-model")
    found = measure_quality(scenario, read_items(scenario.quality), target, 1, quiet)
    assert found is not None
    assert found.right_answers is not None
    assert found.right_answers.verdict == "pass"
    assert found.under_load_share > 0.5
    asked = [len(body["messages"]) for body in server.bodies if "messages" in body]
    assert {1, 3, 5} <= set(asked)  # every step carries what came before


def test_a_server_that_forgets_under_load_fails(server: ScoringServer, own_items: str) -> None:
    server.spoils_under_load = True
    quality = run(server, own_items, probes=0, tolerance=0.02)
    assert quality.right_answers is not None
    assert quality.right_answers.verdict == "fail"
    assert quality.under_load.lost > 10


def test_what_the_server_loses_counts_as_wrong(server: ScoringServer, own_items: str) -> None:
    server.loses = tuple(range(80, 90))  # asking idle takes 66
    quality = run(server, own_items, probes=0)
    loaded = quality.tasks["all"][1]
    assert loaded is not None
    assert loaded.unanswered >= 5
    assert loaded.unanswered - 2 <= quality.under_load.lost <= loaded.unanswered  # two are wrong anyway


def test_a_base_run_gives_flips_and_a_divergence(
    server: ScoringServer, own_items: str, tmp_path: Path
) -> None:
    text = tmp_path / "texts.jsonl"
    text.write_text(json.dumps({"text": "some known words and right others", "domain": "prose"}) + "\n")
    base = run(server, own_items, text_file=str(text), probes=0)
    server.spoils_under_load = True
    found = run(server, own_items, base.idle.answers, text_file=str(text), probes=0).against_base
    assert found is not None
    assert found.items == 33
    assert found.flips > 10
    assert found.kl_tokens == 5
    assert found.kl_lower_bound is not None
    assert found.kl_lower_bound.value > 0.1


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"refuses": "completions"}, "status 400: at most 20 logprobs"),
        ({"refuses": "echo"}, "no log-probabilities"),
    ],
)
def test_a_server_that_cannot_score_is_named_in_one_line(
    server: ScoringServer, own_items: str, setting: dict[str, str], reason: str
) -> None:
    for name, value in setting.items():
        setattr(server, name, value)
    quality = run(server, own_items)
    assert reason in quality.unsupported[0]
    assert quality.right_answers is not None  # the probes are still judged
    assert quality.right_answers.judged == 3


def score(server: ScoringServer, request: Request, top: int = 20) -> tuple[Scorer, Any]:
    async def once() -> tuple[Scorer, Any]:
        target = Target(server.url, "fake-model", timeout_s=10.0)
        async with open_http(target) as http:
            scorer = await find_scorer(http, target, top)
            return scorer, await scorer.score(await scorer.prepare(request), scorer.top)

    return asyncio.run(once())


def test_ids_and_text_give_the_same_score(server: ScoringServer) -> None:
    request = Request("a known question", " right other")
    with_ids, by_ids = score(server, request)
    server.has_tokenize = False
    without, by_text = score(server, request)
    assert (with_ids.sends_ids, without.sends_ids) == (True, False)
    assert by_ids == by_text
    assert by_ids.token_logprobs == (LIKELY, -3.0)
    assert not by_ids.greedy


def test_fewer_log_probabilities_are_taken_where_the_server_gives_fewer(server: ScoringServer) -> None:
    server.most_logprobs = 5
    assert score(server, Request("a", " b"))[0].top == 5
    server.most_logprobs = 0
    with pytest.raises(Unsupported, match="at most 0 logprobs"):
        score(server, Request("a", " b"))


def record(text: str = "", outcome: Outcome = Outcome.COMPLETED) -> RequestRecord:
    return RequestRecord(outcome, 0.0, 1.0, text=text)


def test_probes_are_judged_by_their_form() -> None:
    prose, _, as_json = make_probes(3, 64, with_json=True)
    assert judge(prose, record("All is well.")).failure == ""
    assert judge(prose, record("on and on " * 5)).failure == "repetition"
    assert judge(prose, record("All", Outcome.CUT_OFF)).failure == "truncated"
    assert judge(as_json, record(json_answer())).failure == ""
    assert judge(as_json, record(json_answer()[:-3])).failure == "invalid_json"
    assert as_json.request.body("m")["response_format"]["type"] == "json_schema"
    assert not [one for one in make_probes(9, 64, with_json=False) if one.is_json]


def test_json_must_have_the_fields_and_no_others() -> None:
    assert fits(json_answer())
    assert not any(fits(json_answer(**change)) for change in ({"year": "1815"}, {"more": 1}))
    assert not fits("[]")


def test_repetition_is_a_block_four_times_in_a_row() -> None:
    assert repeats("a b c " * 4)
    assert not repeats("a b c " * 3)
    assert not repeats("the cat and the dog and the bird and the fish")


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (Estimate(0.0, -0.01, 0.01), "pass"),
        (Estimate(-0.10, -0.15, -0.05), "fail"),
        (Estimate(-0.01, -0.05, 0.03), "undecided"),
        (Estimate(-0.015, -0.022, -0.008), "undecided"),
    ],
)
def test_the_verdict_needs_the_interval(change: Estimate, verdict: str) -> None:
    assert judge_change(change, 0.02) == verdict


def test_only_requests_that_met_load_count_as_under_load() -> None:
    load = [Interval(0, 2), Interval(1, 3), Interval(10, 11)]
    asked = [Interval(2.5, 2.9), Interval(4, 5), Interval(10, 10.5), Interval(-1, -0.5)]
    assert share_under_load(asked, load) == 0.5
    assert share_under_load(asked, []) == 0.0


def test_a_base_without_answers_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no quality answers"):
        base_answers({"quality": None}, "a.json")
