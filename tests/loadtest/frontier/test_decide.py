"""A plan that decides, from begin to end on a clock that only its steps move: results, stops, budget, resumption."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from benchmarks.frontier.simulate import CASES, FakeBench, Truth, make_plan, simulate, world

from lowbit_core.errors import ConfigError, EngineError
from lowbit_loadtest.frontier.decide.decision import Decision, claims_of, decide
from lowbit_loadtest.frontier.decide.document import decided_document
from lowbit_loadtest.frontier.decide.evidence import Evidence, Step
from lowbit_loadtest.frontier.decide.rounds import Budget, check_items, run_rounds
from lowbit_loadtest.frontier.page import as_html, as_markdown
from lowbit_loadtest.frontier.plan import FrontierPlan

PLANS = int(os.environ.get("LOWBIT_SIMULATED_PLANS", "20"))
BASE = world(0, 0)["base"]
SMALL = Truth()


class Story:
    """One plan with its bench, its evidence and what was kept."""

    def __init__(
        self,
        truths: Mapping[str, Truth],
        within: str = "60m",
        accuracy: str = "choice_probability",
        change: Mapping[str, Any] | None = None,
        bench: FakeBench | None = None,
    ) -> None:
        self.plan = make_plan(truths, accuracy, within)
        if change:
            data = json.loads(self.plan.model_dump_json(exclude_unset=True))
            data["constraints"] |= change
            self.plan = FrontierPlan.model_validate(data)
        self.bench = bench or FakeBench(truths, 5, accuracy)
        self.evidence, self.kept = Evidence(self.plan), list[Step]()
        self.take({"kind": "begin", "bytes": {name: one.bytes for name, one in truths.items()},
                   "pool": self.bench.pool, "at_s": 0.0, "seconds": 0.0})  # fmt: skip

    def take(self, step: Step) -> None:
        self.kept.append(step)
        self.evidence.add(step)

    def run(self, spent_s: float = 0.0) -> Decision:
        assert self.plan.decide is not None
        budget = Budget(self.plan.decide, self.bench.clock, spent_s)
        return run_rounds(self.plan, self.bench, self.evidence, self.kept.append, budget)

    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            json.dumps(decided_document(self.plan, self.evidence), allow_nan=False)
        )
        return found


def test_of_simulated_plans_with_known_truth_none_in_twenty_says_what_is_false() -> None:
    """The whole count, 200 of each case, is `benchmarks/frontier/simulate.py`'s."""
    cases = list(CASES)
    outcomes = [
        simulate(world(*CASES[cases[seed % len(cases)]]), 1000 + seed, "choice_probability")
        for seed in range(PLANS)
    ]
    assert sum(bool(one.false) for one in outcomes) <= PLANS // 20
    assert all(one.seconds <= 3600 for one in outcomes)
    assert sum(one.verdict in ("winner", "equal") for one in outcomes) >= 0.8 * PLANS


def test_a_clear_winner_ends_early_and_says_who_was_stopped_when_and_why() -> None:
    truths = {
        "base": BASE,
        "fast": replace(SMALL, speed=0.25),
        "slow": SMALL,
        "broken": Truth(speed=0.4, kl=0.6),
    }
    story = Story(truths)
    decision = story.run()
    assert (decision.verdict, decision.names) == ("winner", ("fast",))
    assert story.bench.now_s < 20 * 60
    out = {one["name"]: one for one in story.document()["decision"]["out"]}
    assert "KL from base" in out["broken"]["reason"]
    assert "fast is" in out["slow"]["reason"]
    assert "of the base's bytes" in out["base"]["reason"]
    assert 0 < out["broken"]["at_s"] < story.bench.now_s
    assert not story.evidence.rounds["base"]  # too big to win: its speed is not asked


def test_a_checkpoint_that_is_out_is_asked_nothing_more_and_its_server_ends() -> None:
    story = Story(
        {"base": BASE, "a": SMALL, "b": SMALL, "broken": Truth(speed=0.1, kl=0.9, log_perplexity=0.5)}
    )
    story.run()
    asked = {name: story.evidence.asked("questions", name) for name in ("a", "b", "broken")}
    rounds = {name: story.evidence.asked("round", name) for name in ("a", "b", "broken")}
    assert asked["broken"] < asked["a"]
    assert rounds["broken"] < rounds["a"]
    assert "broken" in story.bench.stopped


def test_equals_are_told_as_a_set_with_their_intervals() -> None:
    story = Story({"base": BASE, "a": SMALL, "b": SMALL})
    decision = story.run()
    assert (decision.verdict, sorted(decision.names)) == ("equal", ["a", "b"])
    document = story.document()
    assert document["recommendation"]["verdict"] == "equal"
    comparisons = {one["name"]: one for one in document["decision"]["claims"] if one["margin"]}
    speed, accuracy = comparisons["throughput"], comparisons["choice_probability"]
    assert 1 / 1.03 < speed["low"] < speed["value"] < speed["high"] < 1.03
    assert -0.01 < accuracy["low"] < accuracy["high"] < 0.01
    for text in (as_markdown(document), as_html(document)):
        assert "Equal within the margins: a, b" in text


def test_without_enough_time_it_says_what_it_would_take() -> None:
    story = Story({"base": BASE, "a": SMALL, "b": SMALL}, within="8m")
    assert story.run().verdict == "undecided"
    assert story.bench.now_s <= 8 * 60
    document = story.document()
    takes = document["decision"]["takes"]
    assert {one["kind"] for one in takes} <= {"round", "questions", "texts"}
    assert takes
    assert all(one["more"] >= 1 and one["minutes"] > 0 for one in takes)
    assert "would tell" in as_markdown(document)


def test_what_nobody_measured_has_no_value_and_no_guess() -> None:
    story = Story({"base": BASE, "a": SMALL, "b": SMALL}, within="2m")
    story.run()
    document = story.document()
    unmeasured = [one for one in document["decision"]["claims"] if one["n"] == 0]
    assert unmeasured
    assert all(one["value"] is None for one in unmeasured)
    reasons = document["recommendation"]["reasons"]
    assert any(reason.endswith("is not measured yet") for reason in reasons)
    assert "limit: kl from base" not in as_html(document)


def test_items_that_are_used_up_end_it_with_what_is_missing() -> None:
    truths = {"base": BASE, "a": SMALL, "b": SMALL}
    bench = FakeBench(truths, 5, "acc_norm", pool={"questions": 300, "texts": 40})
    story = Story(truths, within="10h", accuracy="acc_norm", bench=bench)
    assert story.run().verdict == "undecided"
    assert bench.now_s < 3 * 3600
    assert any(one["available"] == 0 for one in story.document()["decision"]["takes"])


@pytest.mark.parametrize("within", ["2m", "5m", "11m", "17m"])
def test_the_time_is_held(within: str) -> None:
    story = Story(world(0.01, 0.01), within=within)
    story.run()
    assert story.plan.decide is not None
    assert story.bench.now_s <= story.plan.decide.within


class SlowBench(FakeBench):
    """Every round takes longer than the one before."""

    def load(self, name: str, number: int, within_s: float) -> Step:
        self.now_s += number
        return super().load(name, number, within_s)


def test_the_time_is_held_where_rounds_grow_slower() -> None:
    truths = {"base": BASE, "a": SMALL, "b": SMALL}
    story = Story(truths, within="20m", bench=SlowBench(truths, 5, "choice_probability"))
    story.run()
    assert story.bench.now_s <= 20 * 60


def test_a_stopped_plan_goes_on_with_the_time_that_is_left_and_what_it_knew() -> None:
    truths = {"base": BASE, "a": SMALL, "b": SMALL}
    first = Story(truths, within="8m")
    first.run()
    second = Story(truths, within="60m", bench=FakeBench(truths, 5, "choice_probability"))
    second.kept.clear()
    second.evidence = Evidence(second.plan, json.loads(json.dumps(first.kept)))
    spent_s = second.evidence.spent_s
    assert 7 * 60 < spent_s <= 8 * 60
    assert second.run(spent_s).verdict == "equal"
    assert second.bench.now_s + spent_s <= 3600
    again = [
        (step["kind"], step["checkpoint"], step["number"]) for step in second.kept if step["kind"] == "round"
    ]
    before = {("round", step["checkpoint"], step["number"]) for step in first.kept if step["kind"] == "round"}
    assert not before & set(again)


class FailingBench(FakeBench):
    """`fails` does not start."""

    fails = "a"

    def start(self, name: str, within_s: float) -> Step | None:
        if name == self.fails:
            self.now_s += 5
            return {"kind": "failure", "checkpoint": name, "reason": "lowbit serve ended with status 2"}
        return super().start(name, within_s)


def test_a_checkpoint_that_does_not_start_is_out_and_the_others_are_decided() -> None:
    truths = {"base": BASE, "a": SMALL, "b": SMALL}
    story = Story(truths, bench=FailingBench(truths, 5, "choice_probability"))
    decision = story.run()
    assert (decision.verdict, decision.names) == ("winner", ("b",))
    assert "could not be served: lowbit serve ended with status 2" in decision.out["a"]


def test_a_base_that_does_not_start_is_an_error_because_nothing_can_be_compared() -> None:
    truths = {"base": BASE, "a": SMALL, "b": SMALL}
    bench = FailingBench(truths, 5, "choice_probability")
    bench.fails = "base"
    with pytest.raises(
        EngineError, match="the base base, which quality is compared with, could not be served"
    ):
        Story(truths, bench=bench).run()


class LosingBench(FakeBench):
    """`a` fails requests."""

    def load(self, name: str, number: int, within_s: float) -> Step:
        step = super().load(name, number, within_s)
        return (
            {**step, "valid": False, "failed": "3 of 24 requests did not complete (500)"}
            if name == "a"
            else step
        )


def test_a_checkpoint_that_fails_requests_is_out_however_fast() -> None:
    truths = {"base": BASE, "a": Truth(speed=0.5), "b": SMALL}
    story = Story(truths, bench=LosingBench(truths, 5, "choice_probability"))
    decision = story.run()
    assert decision.names == ("b",)
    assert decision.out["a"] == "fails requests: 3 of 24 requests did not complete (500)"


def test_when_nothing_keeps_the_constraints_the_result_is_none() -> None:
    story = Story({"base": BASE, "a": Truth(kl=0.6), "b": Truth(kl=0.7)})
    decision = story.run()
    assert (decision.verdict, decision.names) == ("none", ())
    assert story.document()["recommendation"]["title"] == "Nothing meets the constraints"


def test_too_few_kv_tokens_put_a_checkpoint_out_once_it_has_started() -> None:
    decision = Story({"base": BASE, "a": SMALL, "b": SMALL}, change={"kv_tokens": 50_000}).run()
    assert decision.verdict == "none"
    assert decision.out["a"] == "holds 46,592 KV tokens, below 50,000"


@pytest.mark.parametrize(("objective", "winner"), [("latency", "fast"), ("cost", "cheap")])
def test_objectives_of_which_less_is_better(objective: str, winner: str) -> None:
    truths = {"base": BASE, "fast": replace(SMALL, speed=0.2), "cheap": SMALL}
    story = Story(truths)
    data = json.loads(story.plan.model_dump_json(exclude_unset=True))
    data["decide"]["objective"] = objective
    for one in data["checkpoints"]:
        one["price_per_hour"] = 1.0 if one["name"] == "cheap" else 3.0
    story.plan = FrontierPlan.model_validate(data)
    story.evidence = Evidence(story.plan, story.kept)
    assert story.run().names == (winner,)


def test_of_equals_the_one_whose_kl_is_lower_is_named_and_then_the_smaller_and_then_the_roomier() -> None:
    near, far = Truth(kl=0.05), Truth(kl=0.09)
    assert Story({"base": BASE, "far": far, "near": near}).run().names == ("near",)
    small = replace(SMALL, bytes=0.3)
    decision = Story({"base": BASE, "large": SMALL, "small": small}).run()
    assert decision.names == ("small",)
    assert decision.out["large"].startswith("as good, and has")
    roomy = replace(SMALL, kv_tokens=2 * SMALL.kv_tokens)
    decision = Story({"base": BASE, "a": SMALL, "roomy": roomy}).run()
    assert (decision.verdict, decision.names) == ("winner", ("roomy",))
    assert decision.out["a"] == "as good, and holds 46,592 KV tokens against 93,184"


def test_a_lower_kl_does_not_name_who_is_slower() -> None:
    truths = {"base": BASE, "fast": Truth(speed=0.08, kl=0.09), "near": Truth(kl=0.05)}
    assert Story(truths).run().names == ("fast",)


def test_two_seeds_name_the_same_one_of_equals() -> None:
    truths = {"base": BASE, "far": Truth(kl=0.09), "near": Truth(kl=0.05)}
    assert {simulate(truths, seed, "choice_probability").names for seed in (1, 2)} == {("near",)}


def test_a_claim_that_always_seems_near_does_not_starve_the_others() -> None:
    story = Story({"base": BASE, "a": SMALL, "b": SMALL}, within="20m")
    story.run()
    spent = Counter(step["kind"] for step in story.kept)
    assert spent["round"] >= 10
    assert spent["questions"] >= 5


def test_the_permitted_error_is_shared_by_all_claims_that_could_be_made() -> None:
    story = Story({"base": BASE, "a": SMALL, "b": SMALL, "c": SMALL})
    decision = decide(story.plan, story.evidence)
    assert (
        decision.claims == 3 * 3 + 3 * 3
    )  # three constraints of each, three pairs by speed, accuracy and KL
    claims = claims_of(story.plan, story.evidence)
    assert 6 * claims.alpha + 12 * claims.quick_alpha == pytest.approx(0.05)
    assert decision.alpha == claims.alpha == pytest.approx(0.8 * 0.05 / 6)


def test_with_one_candidate_its_limits_have_the_whole_error() -> None:
    story = Story({"base": BASE, "a": SMALL})
    assert 3 * claims_of(story.plan, story.evidence).quick_alpha == pytest.approx(0.05)


def test_both_are_compared_on_the_items_and_the_rounds_that_both_have() -> None:
    story = Story({"base": BASE, "a": SMALL, "b": SMALL})
    for name, upto in (("a", 40), ("b", 25)):
        story.take(story.bench.ask(name, "questions", 0, upto, 9e9))
    for name, numbers in (("a", (0, 1, 2)), ("b", (1, 2, 3))):
        for number in numbers:
            story.take(story.bench.load(name, number, 9e9))
    assert story.evidence.more_right("a", "b", 0.05).n == 25
    assert story.evidence.faster("a", "b", 0.05).n == 2


def test_a_round_whose_generator_was_late_is_not_believed_but_no_fault_of_the_checkpoint() -> None:
    story = Story({"base": BASE, "a": SMALL, "b": SMALL})
    for name in ("a", "b"):
        for number in range(4):
            story.take({**story.bench.load(name, number, 9e9), "valid": number != 2 or name == "b"})
    assert story.evidence.faster("a", "b", 0.05).n == 3
    assert "a" not in decide(story.plan, story.evidence).out


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ({"questions": 0, "texts": 40}, "has no questions"),
        (
            {"questions": 9, "texts": 8},
            "quality has 8 texts; kl_from_base and perplexity_of_base take 20 or more",
        ),
    ],
)
def test_constraints_without_items_are_refused(pool: Mapping[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_items(Story({"base": BASE, "a": SMALL}).plan, pool)
