"""Scenarios: what is read, what is refused and how, and the schedule that comes of them."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from lowbit_core.errors import ConfigError
from lowbit_loadtest.generate.arrivals import Draw, draw_lengths, generator, send_times_s
from lowbit_loadtest.generate.http.target import Target
from lowbit_loadtest.generate.planner import make_schedule
from lowbit_loadtest.generate.prompts import PromptMaker
from lowbit_loadtest.generate.schedule import Schedule
from lowbit_loadtest.generate.tokens import ServerTokens, WordTokens, find_counter, fit_to_tokens
from lowbit_loadtest.scenario import Scenario, bundled_scenarios, load_scenario, parse_scenario
from lowbit_loadtest.sections.arrivals import Constant, Gamma, Poisson
from lowbit_loadtest.sections.distributions import Lengths
from lowbit_loadtest.sections.prompts import Conversations

POISSON = {"kind": "poisson", "rate_rps": 2}
TEXT = {"kind": "text"}


def scenario(**data: Any) -> Scenario:
    return parse_scenario({"arrivals": POISSON, "prompts": TEXT, **data}, "test")


def schedule(repetition: int = 0, **data: Any) -> Schedule:
    return asyncio.run(make_schedule(scenario(**data), WordTokens(), repetition))


def test_bundled_scenarios_are_valid_and_say_what_they_are_for() -> None:
    assert {
        "quick",
        "chat",
        "bursty",
        "batch",
        "conversations",
        "agentic",
        "saturation",
        "highest-rate",
    } <= set(bundled_scenarios())
    for name in bundled_scenarios():
        assert load_scenario(name).description


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"arivals": {}},
            r"unknown key 'arivals'; did you mean arrivals\? allowed here: description, arrivals",
        ),
        (
            {"arrivals": {"kind": "poisson", "rate": 1}},
            r"unknown key 'arrivals.rate'; did you mean rate_rps\? allowed here: kind, rate_rps",
        ),
        (
            {"prompts": {"kind": "synthetic", "tokens": 8, "shared_prefix": {"group": 1}}},
            r"unknown key 'prompts.shared_prefix.group'; did you mean groups\? allowed here: groups, tokens",
        ),
        ({"prompts": {"kind": "synthetic", "tokens": {"men": 3}}}, "unknown key 'prompts.tokens.men'"),
        (
            {"arrivals": {"kind": "poisson", "rate_rps": -1}},
            "arrivals.rate_rps = -1: allowed is a number above 0",
        ),
        (
            {"quality": {"own": "items.jsonl"}},
            "unknown key 'quality.own'; it is called 'quality.items_file' now",
        ),
        ({"arrivals": {"kind": "bursts"}}, "allowed is kind: poisson, gamma"),
        ({}, "give either requests or duration_s"),
        ({"requests": 3, "duration_s": 3}, "give either requests or duration_s"),
        ({"requests": 3, "prompts": None}, "prompts is missing"),
        ({"requests": 2, "warm_up": {"requests": 2}}, "leaves none of 2 to measure"),
        ({"requests": 2, "arrivals": {"kind": "closed", "concurrency": 3}}, "fewer than concurrency 3"),
        ({"requests": 9, "search": {"low_rps": 1, "high_rps": 2}}, "search needs a limit in slo"),
        (
            {"requests": 9, "prompts": {"kind": "synthetic", "tokens": {"kind": "normal", "mean": 9}}},
            "prompts.tokens = .*normal takes mean, sd",
        ),
    ],
)
def test_wrong_scenario_is_refused_with_the_key(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        scenario(**data)
    assert "\n" not in str(raised.value)


def test_files_are_strict_yaml_with_overrides(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "arrivals: {kind: constant, rate_rps: 2}\nprompts: {kind: file, path: p.jsonl}\nrequests: 4\n"
    )
    read = load_scenario(str(file), ("arrivals.rate_rps=8", "slo.ttft_s=0.5"))
    assert read.arrivals == Constant(kind="constant", rate_rps=8)
    assert read.slo.ttft_s == 0.5
    assert read.prompts is not None
    assert read.prompts.path == str(tmp_path / "p.jsonl")  # type: ignore[union-attr]
    given = load_scenario(str(file), ("prompts.path=p.jsonl",))
    assert given.prompts.path == "p.jsonl"  # type: ignore[union-attr]
    file.write_text("requests: 3\nrequests: 4\n")
    with pytest.raises(ConfigError, match="the key 'requests' stands twice"):
        load_scenario(str(file))
    with pytest.raises(ConfigError, match=r"neither a .yaml file nor one of: agentic, batch"):
        load_scenario("chatt")
    with pytest.raises(ConfigError, match="is not key=value"):
        load_scenario("chat", ("seed",))


def test_send_times_have_the_rate_and_the_burstiness_asked_for() -> None:
    """Over 20,000 gaps the mean is known to 0.7 % (1 sigma) for Poisson, twice that at burstiness 0.25."""
    count = 20_000
    variation = {}
    kinds: dict[str, Poisson | Gamma | Constant] = {
        "poisson": Poisson(kind="poisson", rate_rps=4),
        "gamma": Gamma(kind="gamma", rate_rps=4, burstiness=0.25),
        "constant": Constant(kind="constant", rate_rps=4),
    }
    for name, arrivals in kinds.items():
        gaps = np.diff(send_times_s(arrivals, generator(Draw.ARRIVALS, 1), count, None))
        assert gaps.mean() == pytest.approx(0.25, rel=0.05)
        variation[name] = gaps.std() / gaps.mean()
    assert variation["poisson"] == pytest.approx(1, rel=0.05)
    assert variation["gamma"] == pytest.approx(2, rel=0.1)  # 1 / sqrt(burstiness)
    assert variation["constant"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "arrivals", [Poisson(kind="poisson", rate_rps=50), Constant(kind="constant", rate_rps=50)]
)
def test_a_duration_is_filled_to_its_end_and_not_beyond(arrivals: Poisson | Constant) -> None:
    times = send_times_s(arrivals, generator(Draw.ARRIVALS, 2), None, 10.0)
    assert 400 < times.size < 600
    assert 9.5 < times.max() < 10.0
    assert (np.diff(times) >= 0).all()


def test_the_plan_is_fixed_by_the_seed_and_the_repetition() -> None:
    data: dict[str, Any] = {"prompts": {"kind": "synthetic", "tokens": 20}, "requests": 5}
    assert schedule(**data) == schedule(**data)
    assert schedule(seed=1, **data) != schedule(**data)
    first, second = schedule(**data), schedule(1, **data)
    assert {job.at_s for job in first.jobs}.isdisjoint(job.at_s for job in second.jobs)
    assert not any(job.turns in [other.turns for other in second.jobs] for job in first.jobs)


def test_changing_the_prompts_leaves_the_arrivals_alone() -> None:
    one = schedule(requests=9)
    output = {"tokens": {"kind": "uniform", "min": 1, "max": 9}}
    other = schedule(requests=9, prompts={"kind": "synthetic", "tokens": 7}, output=output)
    assert [job.at_s for job in one.jobs] == [job.at_s for job in other.jobs]


def test_lengths_follow_their_distribution_and_its_bounds() -> None:
    rng = generator(Draw.PROMPT_LENGTHS, 0)
    drawn = draw_lengths(Lengths(kind="lognormal", mean=200, sd=100), rng, 20_000)
    assert np.mean(drawn) == pytest.approx(200, rel=0.03)
    assert np.std(drawn) == pytest.approx(100, rel=0.1)
    assert set(draw_lengths(Lengths(kind="uniform", min=3, max=5), rng, 200)) == {3, 4, 5}
    clipped = draw_lengths(Lengths(kind="normal", mean=10, sd=20, min=5, max=12), rng, 500)
    assert (min(clipped), max(clipped)) == (5, 12)


class TwoTokensAWord:
    """A stand-in tokenizer that gives long words two tokens, and a template of 11."""

    name = "server"
    extra_tokens = 0
    calls = 0

    async def count(self, messages: Any) -> int:
        self.calls += 1
        words = " ".join(message["content"] for message in messages).split()
        return 11 + sum(1 + (len(word) > 4) for word in words)


@pytest.mark.parametrize("tokens", [13, 50, 333])
def test_prompts_are_fitted_to_the_tokenizers_count(tokens: int) -> None:
    counter = TwoTokensAWord()
    words = [("the", "lighthouse", "of", "keeper")[index % 4] for index in range(tokens)]
    messages = asyncio.run(fit_to_tokens(counter, words, tokens))
    assert abs(asyncio.run(counter.count(messages)) - tokens) <= 1  # a word of two cannot make one


def test_the_servers_tokenizer_is_used_when_it_has_one() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/tokenize":
            return httpx.Response(200, json={"count": 5})
        return httpx.Response(404)

    async def find(transport: httpx.MockTransport) -> object:
        async with httpx.AsyncClient(base_url="http://fake/v1/", transport=transport) as http:
            return await find_counter(http, Target("http://fake", "m"))

    assert isinstance(asyncio.run(find(httpx.MockTransport(answer))), ServerTokens)
    assert isinstance(asyncio.run(find(httpx.MockTransport(lambda _: httpx.Response(404)))), WordTokens)


def test_shared_prefixes_are_shared_within_a_group_only() -> None:
    prefix = {"groups": 2, "tokens": 6}
    made = schedule(prompts={"kind": "synthetic", "tokens": 10, "shared_prefix": prefix}, requests=6)
    systems = [job.turns[0].messages[0]["content"] for job in made.jobs]
    users = [job.turns[0].messages[1]["content"] for job in made.jobs]
    assert len(set(systems)) == 2
    assert systems[0] == systems[2] == systems[4]
    assert len(set(users)) == 6
    assert all(len((system + " " + user).split()) == 10 for system, user in zip(systems, users, strict=True))


def test_conversations_have_the_turns_asked_for() -> None:
    prompts = {"kind": "conversations", "turns": {"kind": "uniform", "min": 2, "max": 4}, "user_tokens": 5}
    made = schedule(prompts=prompts, requests=20)
    assert {len(job.turns) for job in made.jobs} == {2, 3, 4}
    assert made.requests == sum(len(job.turns) for job in made.jobs)
    seeds = [job.seed + turn for job in made.jobs for turn in range(len(job.turns))]
    assert seeds == list(range(made.requests))


def test_turns_of_a_conversation_have_the_tokens_asked_for() -> None:
    """Without the template: 9 tokens of text are 20 in a prompt of this stand-in."""
    maker, counter = PromptMaker(TwoTokensAWord(), seed=0), TwoTokensAWord()
    prompts = {
        "kind": "conversations",
        "turns": 3,
        "user_tokens": 9,
        "shared_prefix": {"groups": 2, "tokens": 4},
    }
    asked = Conversations.model_validate(prompts)
    sessions, _ = asyncio.run(maker.make(asked, 5))
    for session in sessions:
        users = [turn.messages[-1:] for turn in session.turns]
        assert all(abs(asyncio.run(counter.count(user)) - 20) <= 1 for user in users)
        assert session.turns[0].messages[0]["role"] == "system"
