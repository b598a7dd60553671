"""What measures for a plan that decides, through HTTP to a stand-in: rounds, questions, texts, servers side by side."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.loadtest.conftest import Reply, serve_fake
from tests.loadtest.frontier.test_frontier import quiet
from tests.loadtest.test_quality import ScoringServer

from lowbit_core.errors import EngineError
from lowbit_core.evals.items import Item, Request
from lowbit_loadtest.frontier.decide.bench import ServedBench
from lowbit_loadtest.frontier.plan import FrontierPlan, load_plan
from lowbit_loadtest.frontier.processes import Served

PLAN = """
checkpoints:
  - {name: base, path: base}
  - {name: small, path: small}
  - {name: other, path: other, serve: [--broken]}
base: base
scenarios:
  - {name: load, scenario: load.yaml}
quality: {tasks: [], concurrency: 2, top_logprobs: 5}
decide: {within: 5m, at_once: 2}
"""
LOAD = """
arrivals: {kind: closed, concurrency: 2}
prompts: {kind: text}
output: {tokens: 8}
requests: 6
generator: {workers: 1, max_lag_s: 5}
"""
QUESTIONS = [
    Item(
        "own", f"q{n}", "choice", (Request(f"question {n}", " right"), Request(f"question {n}", " wrongs")), 0
    )
    for n in range(6)
]
TEXTS = [Item("text:own", f"t{n}", "text", (Request("", f"known words {n}"),)) for n in range(3)]


class Serving:
    """One stand-in for all checkpoints; notes which are up."""

    def __init__(self, server: ScoringServer) -> None:
        self.server, self.up, self.started = server, set[str](), list[str]()

    @contextmanager
    def __call__(
        self, directory: Path, flags: tuple[str, ...], log: Path, timeout_s: float
    ) -> Iterator[Served]:
        if "--broken" in flags:
            raise EngineError("lowbit serve ended with status 2: no such flag")
        self.up.add(directory.name)
        self.started.append(directory.name)
        yield Served(f"{self.server.url}", 1.0)
        self.up.remove(directory.name)


@pytest.fixture
def server() -> Iterator[ScoringServer]:
    yield from serve_fake(ScoringServer(models=("checkpoint",)))


@pytest.fixture
def plan(tmp_path: Path) -> FrontierPlan:
    (tmp_path / "load.yaml").write_text(LOAD)
    (tmp_path / "plan.yaml").write_text(PLAN)
    return load_plan(tmp_path / "plan.yaml")


def test_a_round_has_the_speed_and_a_batch_the_answers_in_order(
    plan: FrontierPlan, server: ScoringServer, tmp_path: Path
) -> None:
    serve = Serving(server)
    with ServedBench(
        plan,
        [*TEXTS, *QUESTIONS],
        lambda name: tmp_path / name,
        quiet,
        serve,
        warm_up=lambda url, on_run: None,
    ) as bench:
        assert bench.pool == {"questions": 6, "texts": 3}
        started = bench.start("base", 60)
        assert started is not None
        assert started["kind"] == "start"
        assert bench.start("base", 60) is None
        step = json.loads(json.dumps(bench.load("base", 0, 60), allow_nan=False))
        assert step["valid"]
        assert step["values"]["throughput"] > 0
        assert step["values"]["end_to_end_s"] >= step["values"]["ttft_s"] > 0
        asked = bench.ask("base", "questions", 2, 5, 60)
        assert [row["id"] for row in asked["answers"]] == ["q2", "q3", "q4"]
        assert all(row["acc_norm"] and 0.9 < row["probability"] < 1 for row in asked["answers"])
        texts = bench.ask("base", "texts", 0, 3, 60)
        assert all(row["tokens"] and row["top"] for row in texts["answers"])
        assert bench.ask("base", "questions", 0, 6, 0.0)["answers"] == []  # no time is left
        server.replies.extend([Reply(status=500)] * 6)
        lost = bench.load("base", 1, 60)
        assert not lost["valid"]
        assert "of 6 requests did not complete" in lost["failed"]
    assert serve.up == set()


def test_no_more_servers_are_up_than_the_plan_allows_and_the_oldest_makes_room(
    plan: FrontierPlan, server: ScoringServer, tmp_path: Path
) -> None:
    serve = Serving(server)
    with ServedBench(
        plan, QUESTIONS, lambda name: tmp_path / name, quiet, serve, warm_up=lambda url, on_run: None
    ) as bench:
        for name in ("base", "small", "base"):
            bench.start(name, 60)
        assert serve.up == {"base", "small"}
        bench.stop("small")
        assert serve.up == {"base"}
        failed = bench.start("other", 60)
        assert failed == {
            "kind": "failure",
            "checkpoint": "other",
            "reason": "lowbit serve ended with status 2: no such flag",
        }
        assert not bench.is_up("other")


def test_a_server_that_cannot_score_is_a_failure_with_its_reason(
    plan: FrontierPlan, server: ScoringServer, tmp_path: Path
) -> None:
    server.refuses = "echo"
    with ServedBench(
        plan,
        QUESTIONS,
        lambda name: tmp_path / name,
        quiet,
        Serving(server),
        warm_up=lambda url, on_run: None,
    ) as bench:
        bench.start("base", 60)
        step = bench.ask("base", "questions", 0, 6, 60)
        assert step["kind"] == "failure"
        assert "no log-probabilities" in step["reason"]
