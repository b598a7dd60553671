"""Plans that decide, on made-up checkpoints whose truth is known: how often is a result wrong, and after how long?

    python benchmarks/frontier/simulate.py --plans 200 --json benchmarks/frontier/results/simulated.json

The whole story of `lowbit frontier` runs (rounds, claims, allocation, budget) on a clock that only these steps move;
a bench gives numbers with the noise of a small shared machine. Each plan has a base that is too big, a fast and a slow
candidate whose speeds or accuracies are a true gap apart, an equal twin, and one that misses its KL. A plan errs if any
statement that its result rests on is false, or if its winner or equal set is: one that it names is in truth worse than
another by more than a margin. Seeds 0 and 1, 2 and 3, … are pairs: how many of those give the same answer? The cases
"demo …" have the variances of a real hour of decide.yaml, and its seconds, halved for a quiet machine.
"""

import argparse
import json
import logging
import math
import random
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit_core.documents import parse_document
from lowbit_loadtest.frontier.decide.claims import Claim
from lowbit_loadtest.frontier.decide.decision import Decision
from lowbit_loadtest.frontier.decide.evidence import Evidence, Step
from lowbit_loadtest.frontier.decide.rounds import Budget, run_rounds
from lowbit_loadtest.frontier.plan import FrontierPlan

Floats = NDArray[np.float64]
DISCORDANT = 0.08  # of items, where accuracy is right or wrong
SHIFT = 0.06  # standard deviation of an item's change, where it is a probability
KL_LIMIT, PERPLEXITY_LIMIT, ACCURACY_LIMIT = 0.2, 1.15, 0.93


@dataclass(frozen=True)
class Machine:
    """Seconds of a step, and how much a round varies: each checkpoint's own noise, and the machine's drift."""

    start_s: float = 45.0
    round_s: float = 10.0
    question_s: float = 0.15
    text_s: float = 0.35
    noise: float = 0.03
    drift: float = 0.05


QUIET = Machine(30.0, 8.0, 0.5, 0.75, 0.025, 0.04)  # decide.yaml on two cores without AMX
BUSY = Machine(55.0, 16.0, 1.0, 1.5, 0.05, 0.08)  # the same beside other work: the hour of 2026-11-28


@dataclass(frozen=True)
class Truth:
    """A made-up checkpoint: the logarithm of its speed, accuracy and log perplexity above the base's, KL, bytes.

    `shifts` move an item's probability: name and standard deviation, the same for all checkpoints with that name.
    """

    speed: float = 0.0
    accuracy: float = 0.0
    log_perplexity: float = 0.04
    kl: float = 0.08
    bytes: float = 0.42
    kv_tokens: int = 46592
    shifts: tuple[tuple[str, float], ...] = ()


BASE = Truth(speed=-0.2, kl=0.0, log_perplexity=0.0, bytes=1.0)
BROKEN = Truth(speed=0.3, accuracy=-0.02, kl=0.35, log_perplexity=0.2)
BASE_ACCURACY = 0.55


@dataclass
class FakeBench:
    """Gives numbers of `truths`; `now_s` is its clock."""

    truths: Mapping[str, Truth]
    seed: int
    accuracy: str
    machine: Machine = Machine()
    pool: Mapping[str, int] = field(default_factory=lambda: {"questions": 8000, "texts": 400})
    now_s: float = 0.0
    up: set[str] = field(default_factory=set)
    stopped: list[str] = field(default_factory=list)
    draws: dict[str, Floats] = field(default_factory=dict)

    def clock(self) -> float:
        return self.now_s

    def is_up(self, name: str) -> bool:
        return name in self.up

    def start(self, name: str, within_s: float) -> Step | None:
        if name in self.up:
            return None
        self.up.add(name)
        self.now_s += self.machine.start_s
        return {"kind": "start", "checkpoint": name, "facts": {"kv_tokens": self.truths[name].kv_tokens}}

    def load(self, name: str, number: int, within_s: float) -> Step:
        self.now_s += self.machine.round_s
        machine = random.Random(f"{self.seed} machine {number}").gauss(0, self.machine.drift)
        own = _heavy(random.Random(f"{self.seed} {name} {number}"), self.machine.noise)
        speed = 140 * math.exp(self.truths[name].speed + machine + own)
        values = {"throughput": speed, "latency": 400 / speed}
        return {"kind": "round", "checkpoint": name, "number": number, "values": values, "valid": True}

    def ask(self, name: str, kind: str, first: int, upto: int, within_s: float) -> Step:
        each_s = self.machine.question_s if kind == "questions" else self.machine.text_s
        upto = min(upto, first + int(within_s / each_s))
        self.now_s += (upto - first) * each_s
        make = self._question if kind == "questions" else self._text
        return {"kind": kind, "checkpoint": name, "answers": [make(name, n) for n in range(first, upto)]}

    def stop(self, name: str) -> None:
        if name in self.up:
            self.up.remove(name)
            self.stopped.append(name)

    def _drawn(self, name: str) -> Floats:
        """Two uniform and one normal number for each question, the same however they are asked.  # (questions, 3)"""
        if name not in self.draws:
            rng = np.random.default_rng([self.seed, *name.encode()])
            count = self.pool["questions"]
            self.draws[name] = np.column_stack([rng.random((count, 2)), rng.normal(size=count)])
        return self.draws[name]

    def _question(self, name: str, number: int) -> dict[str, Any]:
        (level, luck, _), (own, _, moved) = self._drawn(" items")[number], self._drawn(name)[number]
        gap = self.truths[name].accuracy
        right = bool(luck < BASE_ACCURACY)
        if name != "base" and self.accuracy == "acc_norm":
            lost, gained = (
                (DISCORDANT - gap) / 2 / BASE_ACCURACY,
                (DISCORDANT + gap) / 2 / (1 - BASE_ACCURACY),
            )
            right = bool(own >= lost if right else own < gained)
        shift = 0.0 if name == "base" else float(np.clip(self._moved(name, number, moved), -0.3, 0.3)) + gap
        row = {"task": "t", "id": str(number), "kind": "choice", "acc": right, "acc_norm": right}
        return {
            **row,
            "chosen": int(not right),
            "logprob": -1.0,
            "tokens": 3,
            "probability": 0.4 + 0.3 * level + shift,
        }

    def _moved(self, name: str, number: int, own: float) -> float:
        shifts = self.truths[name].shifts
        found = [sd * float(self._drawn(f" {shift}")[number][2]) for shift, sd in shifts]
        return sum(found) if shifts else SHIFT * own

    def _text(self, name: str, number: int) -> dict[str, Any]:
        item, own = random.Random(f"{self.seed} x {number}"), random.Random(f"{self.seed} x {number} {name}")
        truth, tokens = self.truths[name], 120 + int(item.random() * 100)
        nats = (
            2.5 + item.gauss(0, 0.5) + (truth.log_perplexity + own.gauss(0, 0.05) if name != "base" else 0.0)
        )
        kl = truth.kl * item.gammavariate(3.0, 1 / 3) * math.exp(own.gauss(0, 0.2) - 0.02)
        a = (1 - math.sqrt(1 - math.exp(-2 * kl))) / 2  # KL of a fair coin from one of a is kl
        row = {
            "task": "text:a",
            "id": str(number),
            "kind": "text",
            "acc": None,
            "acc_norm": None,
            "chosen": None,
        }
        top = [{"a": math.log(max(a, 1e-300)), "b": math.log(1 - a)}]
        return {**row, "logprob": -nats * tokens, "tokens": tokens, "top": top}


def _heavy(rng: random.Random, scale: float) -> float:
    """Student's t with 5 degrees of freedom: some rounds are far off."""
    return scale * math.sqrt(3 / 5) * rng.gauss(0, 1) / math.sqrt(rng.gammavariate(2.5, 2) / 5)


def make_plan(names: Mapping[str, Truth], accuracy: str, within: str) -> FrontierPlan:
    """The plan of a made-up frontier."""
    data = {
        "checkpoints": [{"name": name, "path": name} for name in names],
        "base": "base",
        "scenarios": [{"name": "load", "scenario": "batch"}],
        "constraints": {
            f"{accuracy}_of_base": ACCURACY_LIMIT,
            "kl_from_base": KL_LIMIT,
            "perplexity_of_base": PERPLEXITY_LIMIT,
            "bytes_of_base": 0.6,
        },
        "decide": {"within": within, "accuracy": accuracy, "questions": 128, "texts": 16},
    }
    return parse_document("plan", data, "simulation", FrontierPlan)


@dataclass(frozen=True)
class Outcome:
    """One simulated plan: its result, the statements of it that are false, and the seconds that it took."""

    verdict: str
    names: tuple[str, ...]
    false: tuple[str, ...]
    seconds: float
    rounds: int
    questions: int


def simulate(
    truths: Mapping[str, Truth], seed: int, accuracy: str, within: str = "60m", machine: Machine = Machine()
) -> Outcome:
    """One plan from begin to end."""
    plan = make_plan(truths, accuracy, within)
    assert plan.decide is not None
    bench = FakeBench(truths, seed, accuracy, machine)
    evidence = Evidence(plan)
    evidence.add(
        {"kind": "begin", "bytes": {name: truth.bytes for name, truth in truths.items()}, "pool": bench.pool}
    )
    decision = run_rounds(plan, bench, evidence, lambda step: None, Budget(plan.decide, bench.clock))
    false = [f"{claim.name} {claim.one} {claim.other} {claim.settled}" for claim in decision.told
             if not is_true(claim, truths)]  # fmt: skip
    false += false_result(decision, truths)
    return Outcome(
        decision.verdict,
        decision.names,
        tuple(false),
        bench.now_s,
        max(len(evidence.rounds[name]) for name in truths),
        max(evidence.asked("questions", name) for name in truths),
    )


def is_true(claim: Claim, truths: Mapping[str, Truth]) -> bool:
    """Whether what a claim says is so."""
    one, other = truths[claim.one], truths[claim.other or claim.one]
    if claim.margin is not None:
        gaps = {
            "round": one.speed - other.speed,
            "questions": one.accuracy - other.accuracy,
            "texts": other.kl - one.kl,
        }
        gap, margin = gaps[claim.kind], claim.margin
        told = {"equal": abs(gap) < margin, "better": gap > 0, "worse": gap < 0, "no worse": gap > -margin}
        return told[claim.settled]
    return (claim.settled == "met") == _keeps(claim, one)


def _keeps(claim: Claim, one: Truth) -> bool:
    if claim.name == "kl_from_base":
        return one.kl <= KL_LIMIT
    if claim.name == "perplexity_of_base":
        return one.log_perplexity <= math.log(PERPLEXITY_LIMIT)
    return BASE_ACCURACY + one.accuracy >= ACCURACY_LIMIT * BASE_ACCURACY


def false_result(decision: Decision, truths: Mapping[str, Truth]) -> list[str]:
    """What is wrong with a winner or an equal set, whatever it rests on: another is better by more than the margins."""
    fit = [name for name, one in truths.items() if one.bytes <= 0.6 and one.kl <= KL_LIMIT]
    if decision.verdict not in ("winner", "equal"):
        return []
    false = [f"{name} does not fit" for name in decision.names if name not in fit]
    best = max(truths[name].speed for name in fit)
    slack = 1e-9  # of sums; a gap of just a margin is no more than it
    false += [
        f"{name} is slow" for name in decision.names if truths[name].speed < best - math.log1p(0.03) - slack
    ]
    fast = [name for name in fit if truths[name].speed > best - slack]
    right = max(truths[name].accuracy for name in fast)
    false += [
        f"{name} is less right" for name in decision.names if truths[name].accuracy < right - 0.01 - slack
    ]
    near = min(truths[name].kl for name in fast if truths[name].accuracy > right - slack)
    false += [f"{name} is further" for name in decision.names if truths[name].kl > near + 0.01 + slack]
    return false


def world(speed_gap: float, accuracy_gap: float) -> dict[str, Truth]:
    """A base that is too big, a leader with a twin, one that is behind by the gaps, and one that misses its KL."""
    behind = Truth(speed=-math.log1p(speed_gap), accuracy=-accuracy_gap)
    return {"base": BASE, "leader": Truth(), "twin": Truth(), "behind": behind, "broken": BROKEN}


def demo(speed_gap: float, accuracy_gap: float) -> dict[str, Truth]:
    """decide.yaml's: what a method and an FP8 cache move in an item; speed is what the cache costs."""
    gptq, awq, fp8 = ("gptq", 0.085), ("awq", 0.085), ("fp8", 0.034)
    slow = -math.log1p(speed_gap)
    return {
        "base": BASE,
        "awq": Truth(0.0, -accuracy_gap, 0.084, 0.094, 0.42, 11648, (awq,)),
        "awq-fp8kv": Truth(slow, -0.002 - accuracy_gap, 0.094, 0.106, 0.42, 23296, (awq, fp8)),
        "gptq": Truth(0.0, 0.0, 0.043, 0.054, 0.42, 11648, (gptq,)),
        "gptq-fp8kv": Truth(slow, -0.002, 0.050, 0.069, 0.42, 23296, (gptq, fp8)),
    }


CASES = {
    "no gap": (0.0, 0.0),
    "1 % in speed": (0.01, 0.0),
    "3 % in speed": (0.03, 0.0),
    "1 % in accuracy": (0.0, 0.01),
    "3 % in accuracy": (0.0, 0.03),
    "3 % in both": (0.03, 0.03),
}
DEMOS = {
    f"demo, {name}, FP8 cache {speed:.0%} slower, gptq {100 * accuracy:g} points ahead": (
        (speed, accuracy),
        machine,
    )
    for name, machine in (("quiet", QUIET), ("busy", BUSY))
    for speed in (0.0, 0.03)
    for accuracy in (0.0, 0.005, 0.01)
}


def _one(job: tuple[str, int, str]) -> Outcome:
    logging.disable(logging.INFO)
    case, seed, accuracy = job
    if case in DEMOS:
        gaps, machine = DEMOS[case]
        return simulate(demo(*gaps), seed, accuracy, machine=machine)
    return simulate(world(*CASES[case]), seed, accuracy)


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """What the plans of one case came to."""
    minutes = sorted(one.seconds / 60 for one in outcomes)
    return {
        "plans": len(outcomes),
        "pairs_of_seeds": len(outcomes) // 2,
        "pairs_with_one_answer": sum(
            (one.verdict, sorted(one.names)) == (two.verdict, sorted(two.names))
            for one, two in zip(outcomes[::2], outcomes[1::2], strict=False)
        ),
        "erred": sum(bool(one.false) for one in outcomes),
        "false": dict(Counter(text for one in outcomes for text in one.false)),
        "results": dict(
            Counter(" ".join((one.verdict, *sorted(one.names))) for one in outcomes).most_common()
        ),
        "minutes": {"median": minutes[len(minutes) // 2], "longest": minutes[-1]},
        "rounds_median": sorted(one.rounds for one in outcomes)[len(outcomes) // 2],
        "questions_median": sorted(one.questions for one in outcomes)[len(outcomes) // 2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plans", type=int, default=200, help="of each case")
    parser.add_argument(
        "--accuracy", default="choice_probability", choices=("choice_probability", "acc_norm")
    )
    parser.add_argument("--cases", nargs="*", default=[*CASES, *DEMOS])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    document = {
        "kind": "lowbit.frontier.simulation",
        "accuracy": arguments.accuracy,
        "within_minutes": 60,
        "confidence": 0.95,
        "machines": {"gaps": asdict(Machine()), "quiet": asdict(QUIET), "busy": asdict(BUSY)},
        "cases": found,
    }
    with ProcessPoolExecutor(arguments.workers) as pool:
        for case in arguments.cases:
            jobs = [(case, seed, arguments.accuracy) for seed in range(arguments.plans)]
            found[case] = summary(list(pool.map(_one, jobs, chunksize=4)))
            print(case, json.dumps(found[case]), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
