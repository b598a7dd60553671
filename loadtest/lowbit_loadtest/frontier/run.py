"""The frontier's story: make the checkpoints that recipes describe, then measure each in turn, again and again.

A run serves one checkpoint, warms it up and runs every scenario once; a checkpoint's first run also asks the quality
questions under the load of one scenario. Repetitions are interleaved, and each starts with another checkpoint, so that
a machine that drifts favours none. Each finished run is a file: the same command goes on where it was stopped.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lowbit_core.errors import ConfigError, EngineError, LowbitError
from lowbit_core.log import get_logger
from lowbit_core.manifest import MANIFEST_NAME
from lowbit_loadtest.frontier.decide.bench import ServedBench
from lowbit_loadtest.frontier.decide.evidence import Evidence, Step
from lowbit_loadtest.frontier.decide.rounds import Budget, Clock, check_items, run_rounds
from lowbit_loadtest.frontier.plan import Checkpoint, FrontierPlan, deciding_load, scenarios_of
from lowbit_loadtest.frontier.processes import Served, quantize, serving
from lowbit_loadtest.frontier.served import server_facts, warm_up, weight_bytes
from lowbit_loadtest.generate.http.target import Target
from lowbit_loadtest.generate.workers import OnRun
from lowbit_loadtest.quality.questions import read_items
from lowbit_loadtest.report.document import as_document
from lowbit_loadtest.runner import run_load_test
from lowbit_loadtest.scenario import Scenario

log = get_logger("frontier")

Document = dict[str, Any]
PLAN_COPY = "plan.json"
Serving = Callable[..., Any]  # serving(directory, flags, log, timeout_s): a context manager of a Served


class Interrupted(LowbitError):
    """Ctrl-C; what was finished is on disk."""

    exit_status = 130


@dataclass(frozen=True)
class OutputDirectory:
    """The directory of one frontier."""

    root: Path

    def prepare(self, plan: FrontierPlan) -> None:
        """Make the directory, or go on in it; ConfigError where it has the runs of another plan."""
        for folder in ("runs", "logs"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        copy, text = self.root / PLAN_COPY, json.dumps(measured_part(plan), indent=1)
        if copy.exists() and copy.read_text(encoding="utf-8") != text:
            raise ConfigError(f"{self.root} has the runs of another plan; give another --out, or remove it")
        copy.write_text(text, encoding="utf-8")
        if self.steps_file.exists():  # a kill may have cut off the last line
            whole = self.steps_file.read_text(encoding="utf-8").rpartition("\n")[0]
            self.steps_file.write_text(whole + "\n" if whole else "", encoding="utf-8")

    def run_file(self, name: str, repetition: int) -> Path:
        return self.root / "runs" / f"{name}-{repetition + 1}.json"

    def log_file(self, name: str) -> Path:
        return self.root / "logs" / f"{name}.log"

    def runs(self, plan: FrontierPlan) -> list[Document]:
        """Every finished run, by repetition."""
        files = [self.run_file(one.name, repetition) for repetition, one in order_of_runs(plan)]
        return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]

    def steps(self) -> list[Step]:
        """Every finished step of a plan that decides; a line that was cut off by a kill is left out."""
        if not self.steps_file.exists():
            return []
        lines = self.steps_file.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]

    @property
    def steps_file(self) -> Path:
        return self.root / "steps.jsonl"

    def keep(self, step: Step) -> None:
        """Append a step, as one line."""
        with self.steps_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(step, allow_nan=False) + "\n")


def measured_part(plan: FrontierPlan) -> Document:
    """The plan without what may change afterwards: constraints, objective, description, the time and the margins."""
    afterwards = {"within": True, "margins": True, "confidence": True, "objective": True, "accuracy": True}
    return plan.model_dump(
        mode="json",
        exclude={"constraints": True, "description": True, "objective": True, "decide": afterwards},
    )


def order_of_runs(plan: FrontierPlan) -> Iterator[tuple[int, Checkpoint]]:
    """Repetition by repetition, each starting one checkpoint further on."""
    count = len(plan.checkpoints)
    for repetition in range(plan.repetitions):
        for place in range(count):
            yield repetition, plan.checkpoints[(place + repetition) % count]


def run_frontier(
    plan: FrontierPlan, out: OutputDirectory, on_run: OnRun, serve: Serving = serving
) -> dict[str, str]:
    """Make every run that is not on disk yet; returns why checkpoints could not be served, by name."""
    scenarios = scenarios_of(plan)
    read_items(plan.quality)  # refuse it before the first server starts
    out.prepare(plan)
    _make_checkpoints(plan, out)
    failures: dict[str, str] = {}
    for repetition, checkpoint in order_of_runs(plan):
        file = out.run_file(checkpoint.name, repetition)
        if file.exists() or checkpoint.name in failures:
            continue
        log.info("run %d of %s", repetition + 1, checkpoint.name)
        try:
            log_file = out.log_file(f"{checkpoint.name}-{repetition + 1}")
            flags = (*plan.serve, *checkpoint.serve)
            with serve(Path(checkpoint.path), flags, log_file, plan.start_timeout_s) as served:
                run = _measure(plan, scenarios, checkpoint, repetition, served, on_run)
        except EngineError as error:
            failures[checkpoint.name] = str(error)
            log.error("%s: %s", checkpoint.name, error)
            continue
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(run, allow_nan=False), encoding="utf-8")
        temporary.replace(file)
    return failures


def run_decision(
    plan: FrontierPlan,
    out: OutputDirectory,
    on_run: OnRun,
    serve: Serving = serving,
    clock: Clock = time.monotonic,
) -> None:
    """Measure until the plan is decided or its time is over; every step goes to `out`, and the same command goes on."""
    assert plan.decide is not None
    items = read_items(plan.quality.model_copy(update={"seed": plan.decide.seed}))
    deciding_load(plan)
    pool = {
        "questions": sum(item.kind != "text" for item in items),
        "texts": sum(item.kind == "text" for item in items),
    }
    check_items(plan, pool)
    out.prepare(plan)
    evidence = Evidence(plan, out.steps())
    evidence.failures.clear()  # tried again
    budget = Budget(plan.decide, clock, evidence.spent_s)
    if not evidence.bytes:
        _make_checkpoints(plan, out)
        sizes = {one.name: weight_bytes(Path(one.path)) for one in plan.checkpoints}
        begin: Step = {"kind": "begin", "bytes": sizes, "pool": pool, "at_s": 0.0, "seconds": budget.spent_s}
        out.keep(begin)
        evidence.add(begin)
    try:
        with ServedBench(plan, items, out.log_file, on_run, serve) as bench:
            run_rounds(plan, bench, evidence, out.keep, budget)
    finally:
        out.keep({"kind": "end", "at_s": budget.spent_s})


def _make_checkpoints(plan: FrontierPlan, out: OutputDirectory) -> None:
    for one in plan.checkpoints:
        if one.recipe and one.model and not (Path(one.path) / MANIFEST_NAME).exists():
            log.info("quantize %s with recipe %s", one.name, one.recipe)
            quantize(one.model, one.recipe, Path(one.path), out.log_file(f"{one.name}-quantize"))
        if not Path(one.path).is_dir():
            raise ConfigError(f"checkpoint {one.name}: {one.path} is not a directory")


def _measure(
    plan: FrontierPlan,
    scenarios: dict[str, Scenario],
    checkpoint: Checkpoint,
    repetition: int,
    served: Served,
    on_run: OnRun,
) -> Document:
    warm_up(served.url, on_run)
    results = {}
    for name, scenario in scenarios.items():
        asks = repetition == 0 and name == (plan.quality_under or plan.scenarios[0].name)
        changed = scenario.model_copy(
            update={"seed": scenario.seed + repetition, "quality": plan.quality if asks else None}
        )
        started = datetime.now(UTC).isoformat(timespec="seconds")
        result = run_load_test(changed, Target(served.url), _titled(on_run, f"{checkpoint.name}, {name}"))
        if result.interrupted:
            raise Interrupted("interrupted; the finished runs are kept, and the same command goes on")
        results[name] = as_document(changed, result, started, requests=False)
        if asks and result.quality is not None:
            results[name]["quality"] = as_document(changed, result, started, requests=True)["quality"]
    return {
        "checkpoint": checkpoint.name,
        "repetition": repetition,
        "ready_s": served.ready_s,
        "server": {**server_facts(served.url), "bytes": weight_bytes(Path(checkpoint.path))},
        "scenarios": results,
    }


def _titled(on_run: OnRun, title: str) -> OnRun:
    return lambda of_run, requests: on_run(f"{title}: {of_run}", requests)
