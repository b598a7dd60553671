"""The story of a plan that decides: look, measure what the decision hangs on, look again, until it is made.

Time is a clock that is handed in, and what measures is a `Bench`, so that the whole story runs in tests and simulations
without a server. A step begins only if it should end within the time: the slowest of its kind so far says how long it
takes. Each step is kept as it ends: the same command goes on, with the seconds that are left.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from lowbit_core.errors import ConfigError, EngineError
from lowbit_core.log import get_logger
from lowbit_loadtest.frontier.decide.allocation import Work, next_work
from lowbit_loadtest.frontier.decide.decision import Decision, decide
from lowbit_loadtest.frontier.decide.evidence import FEWEST_TEXTS, Evidence, Step
from lowbit_loadtest.frontier.plan import Decide, FrontierPlan

log = get_logger("frontier")

Clock = Callable[[], float]
Keep = Callable[[Step], None]
CLOSING_S = 20.0  # for servers to stop and the report to be written


def check_items(plan: FrontierPlan, pool: Mapping[str, int]) -> None:
    """Refuse a plan whose constraints need items that it does not have."""
    limits = plan.constraints
    of_texts = limits.kl_from_base is not None or limits.perplexity_of_base is not None
    if of_texts and pool["texts"] < FEWEST_TEXTS:
        raise ConfigError(
            f"quality has {pool['texts']} texts; kl_from_base and perplexity_of_base take {FEWEST_TEXTS} or more: "
            "give text_file, and more texts of each domain"
        )
    if not pool["questions"]:
        raise ConfigError("quality has no questions to compare accuracy by; give tasks or items_file")


class Bench(Protocol):
    """What measures. Steps are JSON; `failure` instead where the checkpoint does not start."""

    def is_up(self, name: str) -> bool:
        """Whether a checkpoint is served now."""

    def start(self, name: str, within_s: float) -> Step | None:
        """Have a checkpoint served; None where it is already."""

    def load(self, name: str, number: int, within_s: float) -> Step:
        """The load once; its number draws the prompts."""

    def ask(self, name: str, kind: str, first: int, upto: int, within_s: float) -> Step:
        """Questions or texts by their place in the plan's order."""

    def stop(self, name: str) -> None:
        """The checkpoint is not needed any more."""


class Budget:
    """The seconds of a plan, of which earlier sessions spent some."""

    def __init__(self, settings: Decide, clock: Clock, spent_s: float = 0.0) -> None:
        self._clock, self._start_s = clock, clock() - spent_s
        self.within_s = settings.within

    @property
    def spent_s(self) -> float:
        return self._clock() - self._start_s

    @property
    def left_s(self) -> float:
        """Until the closing has to begin."""
        return self.within_s - min(CLOSING_S, 0.1 * self.within_s) - self.spent_s


def run_rounds(plan: FrontierPlan, bench: Bench, evidence: Evidence, keep: Keep, budget: Budget) -> Decision:
    """Measure until the decision is made, the time is over or the items are; returns the last look."""
    assert plan.decide is not None
    while True:
        decision = decide(plan, evidence)
        _tell_who_is_out(decision, bench, evidence, keep, budget)
        _refuse_without_base(plan, decision, evidence)
        work = next_work(decision, evidence, plan.decide)
        if decision.verdict != "undecided" or work is None:
            return decision
        if not _do(plan.decide, work, bench, evidence, keep, budget):
            log.info("the next step would not end in time; %.0f s are left", max(0.0, budget.left_s))
            return decide(plan, evidence)


def _tell_who_is_out(
    decision: Decision, bench: Bench, evidence: Evidence, keep: Keep, budget: Budget
) -> None:
    """Each checkpoint that drops out, once, with the time and the reason; its server ends if nothing asks it."""
    asked = {name for claim in decision.hanging for name in claim.asks}
    at_s = budget.spent_s
    for name, reason in decision.out.items():
        if name not in evidence.out:
            log.info("%s is out after %.1f minutes: %s", name, at_s / 60, reason)
            _take({"kind": "out", "checkpoint": name, "reason": reason, "at_s": at_s}, evidence, keep)
        if name not in asked:
            bench.stop(name)
    for name in [name for name in evidence.out if name not in decision.out]:
        log.info("%s is possible again", name)
        _take({"kind": "back", "checkpoint": name, "at_s": at_s}, evidence, keep)


def _refuse_without_base(plan: FrontierPlan, decision: Decision, evidence: Evidence) -> None:
    asked = {name for claim in decision.hanging for name in claim.asks}
    if plan.base in evidence.failures and plan.base in asked:
        raise EngineError(
            f"the base {plan.base}, which quality is compared with, could not be served: "
            f"{evidence.failures[plan.base]}"
        )


def _do(settings: Decide, work: Work, bench: Bench, evidence: Evidence, keep: Keep, budget: Budget) -> bool:
    """One round, in an order drawn for it; False where the time does not suffice."""
    for name in _order(settings, work):
        started = _start(name, bench, evidence, keep, budget)
        if started is None:
            return False
        if name in evidence.failures:
            return True  # look again: the checkpoint is out
        first = evidence.asked(work.kind, name)
        if work.kind != "round" and first >= work.upto:
            continue
        if not _fits(work.kind, name, work.upto - first, evidence, budget):
            return False
        at_s = budget.spent_s
        if work.kind == "round":
            step = bench.load(name, work.upto, budget.left_s)
        else:
            step = bench.ask(name, work.kind, first, work.upto, budget.left_s)
            log.info(
                "%s: %d %s asked, %.1f of %.0f minutes",
                name, work.upto, work.kind, budget.spent_s / 60, budget.within_s / 60,
            )  # fmt: skip
        _take({**step, "at_s": at_s, "seconds": budget.spent_s - at_s}, evidence, keep)
    return True


def _start(name: str, bench: Bench, evidence: Evidence, keep: Keep, budget: Budget) -> bool | None:
    """Have it served; None where the time does not suffice."""
    if budget.left_s <= 0 or not (bench.is_up(name) or _fits("start", name, 1, evidence, budget)):
        return None
    at_s = budget.spent_s
    step = bench.start(name, budget.left_s)
    if step is not None and step["kind"] == "failure" and budget.left_s <= 0:
        return None  # it may only have been too late
    if step is not None:
        _take({**step, "at_s": at_s, "seconds": budget.spent_s - at_s}, evidence, keep)
    return True


def _take(step: Step, evidence: Evidence, keep: Keep) -> None:
    keep(step)
    evidence.add(step)


def _fits(kind: str, name: str, units: int, evidence: Evidence, budget: Budget) -> bool:
    """Whether it should end in time: by the slowest unit of this kind that the checkpoint had, or else that any had."""
    seen = evidence.seconds.get((kind, name)) or [
        one for (of, _), found in evidence.seconds.items() if of == kind for one in found
    ]
    slowest = max((seconds / count for seconds, count in seen), default=0.0)
    return slowest * (1 if kind == "round" else units) < budget.left_s and budget.left_s > 0


def _order(settings: Decide, work: Work) -> Sequence[str]:
    names = list(work.names)
    random.Random(f"{settings.seed} {work.kind} {work.upto}").shuffle(names)
    return names
