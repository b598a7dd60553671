"""The frontier: plan, runs that go on where they ended, arithmetic, recommendation, and reports that stand alone."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.loadtest.conftest import FakeServer

from lowbit_core.errors import ConfigError, EngineError
from lowbit_core.evals.arithmetic import Estimate
from lowbit_core.pages.html import library
from lowbit_loadtest.frontier.checkpoint_result import CheckpointResult, Status, mean_over_runs, status
from lowbit_loadtest.frontier.document import as_document, pareto
from lowbit_loadtest.frontier.page import as_html, as_markdown
from lowbit_loadtest.frontier.plan import FrontierPlan, load_plan
from lowbit_loadtest.frontier.processes import Served
from lowbit_loadtest.frontier.recommendation import recommend
from lowbit_loadtest.frontier.run import OutputDirectory, order_of_runs, run_decision, run_frontier
from lowbit_loadtest.generate.workers import OnTally

PLAN = """
description: two fakes
checkpoints:
  - {name: base, path: .}
  - {name: small, path: ., serve: [--kv-cache-dtype, fp8]}
base: base
serve: [--enforce-eager]
scenarios:
  - {name: load, scenario: load.yaml}
repetitions: 2
quality: {tasks: [], probes: 3, probe_tokens: 8}
constraints: {ttft_p95_s: 5}
"""
LOAD = """
arrivals: {kind: closed, concurrency: 2}
prompts: {kind: text}
output: {tokens: 8}
requests: 6
generator: {workers: 1, max_lag_s: 1}
"""


@pytest.fixture
def plan(tmp_path: Path) -> FrontierPlan:
    (tmp_path / "load.yaml").write_text(LOAD)
    (tmp_path / "plan.yaml").write_text(PLAN)
    return load_plan(tmp_path / "plan.yaml")


def quiet(title: str, requests: int | None) -> OnTally:
    return lambda tally: None


class FakeServing:
    """Stands for `lowbit serve`: one fake server for all; `broken` names flags of checkpoints that do not start."""

    def __init__(self, server: FakeServer, broken: tuple[str, ...] = ()) -> None:
        self.server, self.broken = server, broken
        self.flags: list[tuple[str, ...]] = []

    @contextmanager
    def __call__(
        self, directory: Path, flags: tuple[str, ...], log: Path, timeout_s: float
    ) -> Iterator[Served]:
        if set(self.broken) & set(flags):
            raise EngineError("lowbit serve ended with status 2: no such flag")
        self.flags.append(flags)
        yield Served(self.server.url, 1.0)


def test_every_checkpoint_is_measured_in_turn_and_a_stopped_run_goes_on(
    plan: FrontierPlan, fake_server: FakeServer, tmp_path: Path
) -> None:
    out, serve = OutputDirectory(tmp_path / "out"), FakeServing(fake_server)
    assert run_frontier(plan, out, quiet, serve) == {}
    fp8 = ("--enforce-eager", "--kv-cache-dtype", "fp8")
    assert serve.flags == [("--enforce-eager",), fp8, fp8, ("--enforce-eager",)]
    out.run_file("small", 1).unlink()
    run_frontier(plan, out, quiet, serve)
    assert len(serve.flags) == 5
    runs = out.runs(plan)
    asked = [bool(run["scenarios"]["load"]["quality"]) for run in runs]
    assert [run["checkpoint"] for run in runs] == ["base", "small", "small", "base"]
    assert asked == [True, True, False, False]
    _check_reports(plan, runs)


def _check_reports(plan: FrontierPlan, runs: list[dict[str, Any]]) -> None:
    document = json.loads(json.dumps(as_document(plan, runs, {}), allow_nan=False))
    assert [one["runs"] for one in document["results"]] == [2, 2]
    assert document["results"][0]["throughput"]["load"]["value"] > 0
    html, table = as_html(document), as_markdown(document)
    assert not re.search(r'\s(src|href)="|url\(', html.replace(library(), ""))
    assert all(name in html and name in table for name in ("base", "small", "load, tokens/s"))


def test_another_plans_runs_are_refused_but_other_constraints_are_not(
    plan: FrontierPlan, fake_server: FakeServer, tmp_path: Path
) -> None:
    out = OutputDirectory(tmp_path / "out")
    out.prepare(plan)
    other = plan.model_copy(update={"constraints": plan.constraints.model_copy(update={"ttft_p95_s": 1.0})})
    out.prepare(other)
    with pytest.raises(ConfigError, match="has the runs of another plan"):
        out.prepare(plan.model_copy(update={"serve": ()}))


def test_a_checkpoint_that_does_not_start_is_reported_and_the_others_are_measured(
    plan: FrontierPlan, fake_server: FakeServer, tmp_path: Path
) -> None:
    out = OutputDirectory(tmp_path / "out")
    failures = run_frontier(plan, out, quiet, FakeServing(fake_server, broken=("fp8",)))
    assert failures == {"small": "lowbit serve ended with status 2: no such flag"}
    document = as_document(plan, out.runs(plan), failures)
    assert [one["name"] for one in document["results"]] == ["base"]
    assert "small could not be served" in as_html(document)
    assert "small could not be served" in as_markdown(document)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("base: base", "base: other"), "base 'other' is none of the checkpoints"),
        (("name: small", "name: base"), "two of the checkpoints are called 'base'"),
        (("repetitions: 2", "repetition: 2"), "unknown key 'repetition'"),
        (("path: .}", "path: ., recipe: awq}"), "recipe and model belong together"),
        (("ttft_p95_s: 5", "ttft_p95_s: -5"), "constraints.ttft_p95_s"),
        (("base: base", "base: base\nbase: base"), "stands twice"),
        (("base: base", "base: base\nquality_under: x"), "quality_under 'x' is none of the scenarios"),
        (
            ("ttft_p95_s: 5", "accuracy_of_base: 0.9"),
            "unknown key 'constraints.accuracy_of_base'; it is called 'constraints.acc_norm_of_base' now",
        ),
        (("probes: 3", "items: 3"), "unknown key 'quality.items'; it is called 'quality.limit' now"),
        (("base: base", "base: base\ndecide: {within: 60m}"), "leave out repetitions"),
        (
            ("repetitions: 2", "quality_under: load\ndecide: {within: 60m}"),
            "asks without other load; leave out quality_under",
        ),
        (
            ("repetitions: 2", "decide: {within: soon}"),
            "decide.within = 'soon': allowed is a number above 0 of seconds, or text like 90s, 60m, 1.5h",
        ),
        (("repetitions: 2", "decide: {within: -3m}"), "decide.within"),
        (("repetitions: 2", "decide: {within: 0h}"), "decide.within"),
        (("repetitions: 2", "decide: {withn: 60m}"), "unknown key 'decide.withn'; did you mean within?"),
        (("repetitions: 2", "decide: {within: 60m, objective: speed}"), "decide.objective = 'speed'"),
        (
            ("repetitions: 2", "decide: {within: 60m, objective: cost}"),
            "needs a price_per_hour of each checkpoint; base has none",
        ),
        (
            ("repetitions: 2", "decide: {within: 60m, margins: {objective: 3}}"),
            "decide.margins.objective = 3",
        ),
        (
            ("scenarios:", "decide: {within: 60m}\nscenarios:\n  - {name: b, scenario: load.yaml}"),
            "leave out repetitions",
        ),
        (
            ("ttft_p95_s: 5", "choice_probability_of_base: 0.9"),
            "choice_probability_of_base is measured where the plan has decide",
        ),
        (("ttft_p95_s: 5", "bytes_of_base: 0"), "constraints.bytes_of_base"),
        (("ttft_p95_s: 5", "kv_tokens: 0.5"), "constraints.kv_tokens"),
    ],
)
def test_a_wrong_plan_is_refused_with_its_key(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN.replace(*change, 1))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_plan(tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("60m", 3600), ("90s", 90), ("1.5h", 5400), ("45", 45), (" 2 m ", 120), ("7.5", 7.5)],
)
def test_the_time_of_a_decision_is_given_in_seconds_minutes_or_hours(
    tmp_path: Path, text: str, seconds: float
) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN.replace("repetitions: 2", f"decide: {{within: {text}}}"))
    plan = load_plan(tmp_path / "plan.yaml")
    assert plan.decide is not None
    assert plan.decide.within == seconds


@pytest.mark.parametrize(
    ("decide", "constraint", "message"),
    [
        (
            "accuracy: acc_norm",
            "choice_probability_of_base: 0.9",
            "needs decide.accuracy: choice_probability",
        ),
        ("accuracy: choice_probability", "acc_norm_of_base: 0.9", "needs decide.accuracy: acc_norm"),
    ],
)
def test_a_constraint_on_another_measure_than_the_decisions_is_refused(
    tmp_path: Path, decide: str, constraint: str, message: str
) -> None:
    text = PLAN.replace("repetitions: 2", f"decide: {{within: 60m, {decide}}}")
    (tmp_path / "plan.yaml").write_text(text.replace("ttft_p95_s: 5", constraint))
    with pytest.raises(ConfigError, match=message):
        load_plan(tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    ("load", "objective", "message"),
    [
        ("arrivals: {kind: ramp, start_rps: 1, max_rps: 2, stage_s: 1}\nprompts: {kind: text}", "throughput",
         "decide repeats one load; a ramp, a search and a sweep are several"),
        (LOAD, "goodput", "the objective goodput needs a limit in slo"),
    ],
)  # fmt: skip
def test_a_load_that_cannot_decide_is_refused_before_anything_is_served(
    tmp_path: Path, fake_server: FakeServer, load: str, objective: str, message: str
) -> None:
    (tmp_path / "load.yaml").write_text(load)
    decide = f"decide: {{within: 60m, objective: {objective}}}"
    (tmp_path / "plan.yaml").write_text(PLAN.replace("repetitions: 2", decide))
    serve = FakeServing(fake_server)
    with pytest.raises(ConfigError, match=message):
        run_decision(load_plan(tmp_path / "plan.yaml"), OutputDirectory(tmp_path / "out"), quiet, serve)
    assert serve.flags == []


def test_the_time_and_the_margins_may_change_where_a_stopped_decision_goes_on_but_not_the_seed(
    tmp_path: Path,
) -> None:
    (tmp_path / "load.yaml").write_text(LOAD)
    (tmp_path / "plan.yaml").write_text(PLAN.replace("repetitions: 2", "decide: {within: 5m}"))
    out = OutputDirectory(tmp_path / "out")
    out.prepare(load_plan(tmp_path / "plan.yaml"))
    out.prepare(load_plan(tmp_path / "plan.yaml", ("decide.within=60m", "decide.margins.objective=0.05")))
    with pytest.raises(ConfigError, match="has the runs of another plan"):
        out.prepare(load_plan(tmp_path / "plan.yaml", ("decide.seed=2",)))


def test_a_step_that_a_kill_cut_off_is_left_out_and_the_next_begins_a_line(tmp_path: Path) -> None:
    (tmp_path / "load.yaml").write_text(LOAD)
    (tmp_path / "plan.yaml").write_text(PLAN.replace("repetitions: 2", "decide: {within: 5m}"))
    out = OutputDirectory(tmp_path / "out")
    out.prepare(load_plan(tmp_path / "plan.yaml"))
    out.keep({"kind": "end", "at_s": 1.0})
    with out.steps_file.open("a") as file:
        file.write('{"kind": "round", "check')
    assert out.steps() == [{"kind": "end", "at_s": 1.0}]
    out.prepare(load_plan(tmp_path / "plan.yaml"))
    out.keep({"kind": "end", "at_s": 2.0})
    assert [step["at_s"] for step in out.steps()] == [1.0, 2.0]


def sized(name: str, size: int, kv_tokens: int) -> dict[str, Any]:
    server = {"engine": {"kv_tokens": kv_tokens}, "bytes": size}
    return {
        "checkpoint": name,
        "repetition": 0,
        "ready_s": 1.0,
        "server": server,
        "scenarios": {"load": {"points": list[Any]()}},
    }


@pytest.mark.parametrize(
    ("constraint", "statuses"),
    [("bytes_of_base: 0.5", ["missed", "met"]), ("kv_tokens: 900", ["met", "missed"])],
)
def test_bytes_and_kv_tokens_are_constraints_of_every_plan(
    tmp_path: Path, constraint: str, statuses: list[Status]
) -> None:
    (tmp_path / "load.yaml").write_text(LOAD)
    (tmp_path / "plan.yaml").write_text(PLAN.replace("ttft_p95_s: 5", constraint))
    plan = load_plan(tmp_path / "plan.yaml")
    runs = [sized("base", 1000, 1000), sized("small", 400, 800)]
    document = as_document(plan, runs, {})
    key = constraint.partition(":")[0]
    assert [one["statuses"][key] for one in document["results"]] == statuses
    assert document["recommendation"]["name"] == ("small" if statuses[1] == "met" else "base")


def test_a_missing_scenario_is_refused_before_anything_is_served(
    fake_server: FakeServer, tmp_path: Path
) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    serve = FakeServing(fake_server)
    with pytest.raises(ConfigError, match=r"load\.yaml does not exist"):
        run_frontier(load_plan(tmp_path / "plan.yaml"), OutputDirectory(tmp_path / "out"), quiet, serve)
    assert serve.flags == []


def test_the_order_turns_with_each_repetition(plan: FrontierPlan) -> None:
    assert [(n, one.name) for n, one in order_of_runs(plan)] == [
        (0, "base"), (0, "small"), (1, "small"), (1, "base"),
    ]  # fmt: skip


def test_runs_give_students_interval() -> None:
    found = mean_over_runs([10.0, 12.0, 14.0])
    assert found.value == 12
    assert found.low == pytest.approx(12 - 4.302653 * 2 / 3**0.5)
    assert mean_over_runs([5.0]) == Estimate(5.0, None, None)


@pytest.mark.parametrize(
    ("one", "at_least", "expected"),
    [
        (Estimate(1.0, 0.99, 1.01), True, "met"),
        (Estimate(0.9, 0.85, 0.95), True, "missed"),
        (Estimate(1.0, 0.95, 1.05), True, "undecided"),
        (Estimate(1.0, 0.9, 1.1), False, "undecided"),
        (Estimate(0.9, 0.8, 0.95), False, "met"),
        (None, True, "undecided"),
    ],
)
def test_a_constraint_is_met_only_by_the_whole_interval(
    one: Estimate | None, at_least: bool, expected: Status
) -> None:
    assert status(one, 0.98, at_least) == expected


def result_of(
    name: str, speed: tuple[float, float, float], acc_norm: float, **statuses: Status
) -> CheckpointResult:
    quality = Estimate(acc_norm, acc_norm - 0.01, acc_norm + 0.01)
    return CheckpointResult(
        name=name,
        runs=3,
        throughput={"load": Estimate(*speed)},
        acc_norm=quality,
        perplexity=None,
        acc_norm_of_base=quality,
        perplexity_of_base=None,
        against_base=None,
        quality_under_load="pass",
        memory_bytes={},
        kv_tokens=None,
        statuses=dict(statuses),
    )


SLOW = result_of("slow", (100, 98, 102), 0.6, acc_norm_of_base="met")
FAST = result_of("fast", (150, 145, 155), 0.59, acc_norm_of_base="met")
BAD = result_of("bad", (200, 190, 210), 0.3, acc_norm_of_base="missed")
OPEN = result_of("open", (160, 150, 170), 0.58, acc_norm_of_base="undecided")
NEAR = result_of("near", (149, 140, 158), 0.6, acc_norm_of_base="met")


@pytest.mark.parametrize(
    ("results", "verdict", "name"),
    [
        ([SLOW, FAST, BAD], "recommended", "fast"),
        ([BAD], "none", None),
        ([SLOW, OPEN], "undecided", "slow"),
        ([SLOW, FAST, NEAR], "undecided", "fast"),
        ([OPEN, BAD], "undecided", "open"),
    ],
)
def test_the_recommendation_says_when_the_data_cannot_decide(
    plan: FrontierPlan, results: list[CheckpointResult], verdict: str, name: str | None
) -> None:
    limits = plan.constraints.model_copy(update={"acc_norm_of_base": 0.99})
    found = recommend(plan.model_copy(update={"constraints": limits}), results, ("base", "small"))
    assert (found.verdict, found.name) == (verdict, name)
    if OPEN in results:
        assert any("items would tell" in reason for reason in found.reasons)
    if NEAR in results:
        assert any("more repetitions would tell" in reason for reason in found.reasons)


def test_an_undecided_checkpoint_that_is_surely_slower_does_not_hold_up_the_decision(
    plan: FrontierPlan,
) -> None:
    late = result_of("late", (90, 80, 99), 0.58, acc_norm_of_base="undecided")
    assert recommend(plan, [FAST, late], ("base", "small")).verdict == "recommended"


def test_nothing_is_recommended_while_a_checkpoint_was_not_measured(plan: FrontierPlan) -> None:
    found = recommend(plan, [FAST], ("base",))
    assert (found.verdict, found.name) == ("undecided", "fast")
    assert "small was not measured yet" in found.reasons


def test_speeds_of_a_late_generator_are_no_ground_for_a_recommendation(plan: FrontierPlan) -> None:
    found = recommend(plan, [SLOW, replace(FAST, invalid_points=2)], ("base", "small"))
    assert found.verdict == "undecided"
    assert any("the generator fell behind in 2" in reason for reason in found.reasons)


def test_the_pareto_frontier_has_no_dominated_point() -> None:
    assert pareto([SLOW, FAST, BAD, result_of("dominated", (99, 90, 110), 0.55)], "load") == [
        "slow",
        "fast",
        "bad",
    ]
