"""Measures for a plan that decides: servers that stay up side by side, the load once, a batch of questions or texts.

Only one server has requests at a time. With `at_once` servers up, rounds of different checkpoints follow each other
within seconds, so that drift of the machine meets all alike, and no start is paid twice.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from lowbit_core.errors import EngineError, LowbitError
from lowbit_core.evals.items import Item, Key
from lowbit_core.evals.results import as_rows
from lowbit_core.log import get_logger
from lowbit_loadtest.frontier.decide.evidence import Step
from lowbit_loadtest.frontier.plan import Checkpoint, FrontierPlan, deciding_load
from lowbit_loadtest.frontier.processes import MODEL, Served
from lowbit_loadtest.frontier.served import server_facts, warm_up
from lowbit_loadtest.generate.http.target import Target
from lowbit_loadtest.generate.records import Outcome
from lowbit_loadtest.generate.workers import OnRun
from lowbit_loadtest.quality.questions import Question, QuestionSet, ask_all, prepare
from lowbit_loadtest.report.result import Point
from lowbit_loadtest.runner import run_load_test

log = get_logger("frontier")

Serving = Callable[..., Any]  # serving(directory, flags, log, timeout_s): a context manager of a Served
WarmUp = Callable[[str, OnRun], None]
COMPLETED_SHARE = 0.99
SEEDS_APART = 100_000  # rounds of one seed of the plan


class ServedBench:
    """The servers of one plan. `items` are all questions and texts, in the order of asking."""

    def __init__(
        self,
        plan: FrontierPlan,
        items: Sequence[Item],
        log_file: Callable[[str], Path],
        on_run: OnRun,
        serve: Serving,
        warm_up: WarmUp = warm_up,
    ) -> None:
        assert plan.decide is not None
        self._plan, self._decide, self._scenario = plan, plan.decide, deciding_load(plan)
        self._items = {
            "questions": [item for item in items if item.kind != "text"],
            "texts": [item for item in items if item.kind == "text"],
        }
        self.pool = {kind: len(found) for kind, found in self._items.items()}
        self._log_file, self._on_run, self._serve, self._warm_up = log_file, on_run, serve, warm_up
        self._checkpoints = {one.name: one for one in plan.checkpoints}
        self._up: OrderedDict[str, tuple[Served, ExitStack]] = OrderedDict()
        self._prepared: dict[tuple[str, Key], Question] = {}
        self._asks: dict[
            str, tuple[int, bool]
        ] = {}  # by URL: top log-probabilities, and whether ids are sent

    def __enter__(self) -> "ServedBench":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._up:
            with ThreadPoolExecutor(len(self._up)) as pool:
                list(pool.map(self.stop, list(self._up)))

    def is_up(self, name: str) -> bool:
        """Whether a checkpoint is served now."""
        return name in self._up

    def start(self, name: str, within_s: float) -> Step | None:
        """Have a checkpoint served, in place of the one that was asked longest ago where no more may be up."""
        if name in self._up:
            self._up.move_to_end(name)
            return None
        while len(self._up) >= self._decide.at_once:
            self.stop(next(iter(self._up)))
        one, stack = self._checkpoints[name], ExitStack()
        log.info("start %s", name)
        try:
            served = stack.enter_context(
                self._serve(
                    Path(one.path),
                    (*self._plan.serve, *one.serve),
                    self._log_file(f"{name}-{len(self._asks) + 1}"),
                    min(within_s, self._plan.start_timeout_s),
                )
            )
        except EngineError as error:
            return {"kind": "failure", "checkpoint": name, "reason": str(error)}
        self._up[name] = (served, stack)
        self._warm_up(served.url, self._on_run)
        facts = server_facts(served.url)
        return {"kind": "start", "checkpoint": name, "ready_s": served.ready_s, "facts": facts["engine"]}

    def stop(self, name: str) -> None:
        """End its server, if it is up."""
        if name in self._up:
            _, stack = self._up.pop(name)
            stack.close()

    def load(self, name: str, number: int, within_s: float) -> Step:
        """The plan's scenario once, with the round's own prompts."""
        scenario = self._scenario.model_copy(
            update={
                "seed": self._scenario.seed + SEEDS_APART * self._decide.seed + number,
                "timeout_s": max(1.0, min(self._scenario.timeout_s, within_s)),
            }
        )
        url = self._up[name][0].url
        try:
            result = run_load_test(scenario, Target(url), self._titled(f"{name}, round {number + 1}"))
        except LowbitError as error:
            return {"kind": "failure", "checkpoint": name, "reason": str(error)}
        if result.interrupted:
            raise KeyboardInterrupt
        point = result.points[0]
        failed = _failed(point)
        return {
            "kind": "round",
            "checkpoint": name,
            "number": number,
            "values": _values(point),
            "valid": point.valid and not failed,
            **({"failed": failed} if failed else {}),
            **({"invalid_because": list(point.invalid_because)} if point.invalid_because else {}),
        }

    def ask(self, name: str, kind: str, first: int, upto: int, within_s: float) -> Step:
        """The items first..upto of a kind; those that were not asked in time are left out, with all after them."""
        try:
            questions = self._questions(name, self._items[kind][first:upto])
        except EngineError as error:
            return {"kind": "failure", "checkpoint": name, "reason": str(error)}
        stop = threading.Event()
        if within_s <= 0:
            stop.set()
        timer = threading.Timer(max(0.0, within_s), stop.set)
        timer.daemon = True
        timer.start()
        try:
            asked = ask_all(self._set(name, questions), stop)
        finally:
            timer.cancel()
        answers = {}
        for item, _ in questions:
            if item.key not in asked.answers:
                break
            answers[item.key] = asked.answers[item.key]
        if answers and all(one.logprob is None for one in answers.values()):
            return {
                "kind": "failure",
                "checkpoint": name,
                "reason": f"none of {len(answers)} {kind} was scored",
            }
        return {"kind": kind, "checkpoint": name, "answers": as_rows(answers)}

    def _set(self, name: str, questions: Sequence[Question]) -> QuestionSet:
        url = self._up[name][0].url
        top, sends_ids = self._asks[url]
        concurrency = self._plan.quality.concurrency
        return QuestionSet(self._target(url), concurrency, tuple(questions), (), top, sends_ids, ())

    def _questions(self, name: str, items: Sequence[Item]) -> list[Question]:
        """Prompts, made once for all checkpoints with the same tokenizer; EngineError if it cannot score them."""
        url, tokenizer = self._up[name][0].url, _tokenizer(self._checkpoints[name])
        missing = [item for item in items if (tokenizer, item.key) not in self._prepared]
        if missing or url not in self._asks:
            quality = self._plan.quality.model_copy(update={"probes": 0})
            found = prepare(quality, missing, self._target(url))
            if found.unsupported:
                raise EngineError(f"{name}: {found.unsupported[0]}")
            self._asks[url] = (found.top, found.sends_ids)
            self._prepared |= {(tokenizer, question[0].key): question for question in found.questions}
        return [self._prepared[tokenizer, item.key] for item in items]

    def _target(self, url: str) -> Target:
        return Target(url, MODEL, None, self._scenario.timeout_s)

    def _titled(self, title: str) -> OnRun:
        return lambda of_run, requests: self._on_run(title, requests)


def _tokenizer(one: Checkpoint) -> str:
    file = Path(one.path) / "tokenizer.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else one.path


def _failed(point: Point) -> str:
    """What went wrong, where fewer than 99 % of the requests completed."""
    outcomes, requests = point.summary.outcomes, point.summary.requests
    completed = outcomes.get(Outcome.COMPLETED, 0)
    if completed >= COMPLETED_SHARE * requests:
        return ""
    why = next(iter(point.summary.details), "no reason given")
    return f"{requests - completed} of {requests} requests did not complete ({why})"


def _values(point: Point) -> dict[str, float | None]:
    """What a round gives. Goodput of 0 counts as half a request, so that it has a logarithm."""
    summary = point.summary
    goodput = summary.goodput_rps
    if goodput == 0 and summary.duration_s:
        goodput = 0.5 / summary.duration_s
    distributions = {
        name: getattr(summary, name) for name in ("ttft_s", "time_per_output_token_s", "end_to_end_s")
    }
    return {
        "throughput": summary.output_tokens_per_s,
        "goodput": goodput,
        "latency": summary.end_to_end_s.mean if summary.end_to_end_s else None,
        **{name: found.p95 if found else None for name, found in distributions.items()},
    }
