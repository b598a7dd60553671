"""What the rounds have shown so far: steps in, confidence sequences out. Pure arithmetic.

A step is one thing that was done, as JSON: `begin` (sizes, and how many items there are), or with one checkpoint:
`start` (with what the server says of itself), `round` (the load, once), `questions` and `texts` (answers to some of the
items, in the order of the plan's seed), `failure`, `out` and `back`.
Two checkpoints are compared on what both did: the same rounds, which drift of the machine meets alike, and the same
items. Items come in one random order for all, so that the first n are n drawn ones.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lowbit_core.evals.arithmetic import kl_lower_bound
from lowbit_core.evals.items import Key
from lowbit_core.evals.results import from_rows
from lowbit_core.evals.scoring import Answer
from lowbit_loadtest.frontier.decide.sequences import Confidence, bounded_mean, normal_mean, ratio_of_sums
from lowbit_loadtest.frontier.plan import FrontierPlan

Step = dict[str, Any]
PLANNED_ROUNDS, PLANNED_TEXTS = 40, 100  # where the intervals are narrowest
FEWEST_TEXTS = 20  # KL is heavy-tailed: its sequence is asymptotic
LOWER_IS_BETTER = ("latency", "cost")
WASTED = 2  # rounds of a checkpoint that failed requests, after which it is out


class Evidence:
    """All steps of one plan; `add` takes them as they come."""

    def __init__(self, plan: FrontierPlan, steps: Iterable[Step] = ()) -> None:
        assert plan.decide is not None
        self.decide = plan.decide
        self.prices = {one.name: one.price_per_hour for one in plan.checkpoints}
        self.steps: list[Step] = []
        self.rounds: dict[str, dict[int, Mapping[str, float | None]]] = defaultdict(dict)
        self.answers: dict[tuple[str, str], dict[Key, Answer]] = defaultdict(dict)  # by kind and checkpoint
        self.facts: dict[str, Mapping[str, Any]] = {}
        self.failures: dict[str, str] = {}
        self.seconds: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
        self.bytes: Mapping[str, float | None] = {}
        self.pool: Mapping[str, int] = {}  # how many questions and texts there are
        self.out: dict[str, Step] = {}  # the step that said so
        self._made: dict[tuple[Any, ...], tuple[tuple[int, int], Confidence]] = {}
        self._divergences: dict[tuple[str, Key], tuple[float, int]] = {}
        for step in steps:
            self.add(step)

    def add(self, step: Step) -> None:
        self.steps.append(step)
        kind, name, units = step["kind"], step.get("checkpoint", ""), 1
        if kind == "begin":
            self.bytes, self.pool = step["bytes"], step["pool"]
        elif kind == "start":
            self.facts[name] = step["facts"]
            self.failures.pop(name, None)
        elif kind == "failure":
            self.failures[name] = step["reason"]
        elif kind == "out":
            self.out[name] = step
        elif kind == "back":
            self.out.pop(name, None)
        elif kind == "round":
            self.rounds[name][step["number"]] = step["values"] if step["valid"] else {}
        elif kind in ("questions", "texts"):
            found = from_rows(step["answers"])
            self.answers[kind, name].update(found)
            units = max(1, len(found))
        if "seconds" in step:
            self.seconds[kind, name].append((step["seconds"], units))

    @property
    def spent_s(self) -> float:
        """When the last step ended, in seconds of the plan's time."""
        return max((step.get("at_s", 0.0) + step.get("seconds", 0.0) for step in self.steps), default=0.0)

    def bytes_of(self, name: str) -> float:
        """Of its files with weights; 0 where unknown."""
        return self.bytes.get(name) or 0.0

    def asked(self, kind: str, name: str) -> int:
        """How many rounds, questions or texts a checkpoint has."""
        return len(self.rounds[name]) if kind == "round" else len(self.answers[kind, name])

    def unit_s(self, kind: str, name: str) -> float:
        """Seconds of a round, a question or a text of one checkpoint; of any where it had none, 1 at first."""
        own = self.seconds.get((kind, name)) or [
            one for (of, _), found in self.seconds.items() if of == kind for one in found
        ]
        units = sum(count for _, count in own)
        return sum(seconds for seconds, _ in own) / units if units else 1.0

    def values(self, name: str, measure: str) -> dict[int, float]:
        """A measure in each round that can be believed, by the round's number; `cost` is money per million tokens."""
        found = {}
        for number, values in self.rounds[name].items():
            value = values.get("throughput" if measure == "cost" else measure)
            if value is not None and value > 0:
                price = self.prices[name] or 0.0
                found[number] = 1e6 / 3600 * price / value if measure == "cost" else value
        return found

    def faster(self, one: str, other: str, alpha: float) -> Confidence:
        """log of the objective's ratio, round by round; above 0 where `one` is the better."""
        objective = self.decide.objective
        ours, theirs = self.values(one, objective), self.values(other, objective)
        sign = -1.0 if objective in LOWER_IS_BETTER else 1.0
        both = sorted(ours.keys() & theirs.keys())
        return normal_mean(
            [sign * math.log(ours[number] / theirs[number]) for number in both], alpha, PLANNED_ROUNDS
        )

    def level(self, name: str, measure: str, alpha: float) -> Confidence:
        """The mean of a measure's logarithm over rounds."""
        values = [math.log(value) for _, value in sorted(self.values(name, measure).items())]
        return normal_mean(values, alpha, PLANNED_ROUNDS)

    def more_right(
        self, one: str, other: str, alpha: float, share: float = 1.0, measure: str | None = None
    ) -> Confidence:
        """The mean of accuracy of `one` minus `share` times that of `other`, item by item; by the plan's measure."""
        by = measure or self.decide.accuracy
        if share == 1 and one > other:
            return self.more_right(other, one, alpha, measure=by).mirrored

        def make() -> Confidence:
            pairs = self._pairs("questions", one, other)
            values = [_right(ours, by) - share * _right(theirs, by) for ours, theirs in pairs]
            return bounded_mean(values, -share, 1.0, alpha)

        return self._once(("questions", one, other, by, share, alpha), make)

    def right_share(self, name: str, alpha: float, measure: str) -> Confidence:
        """Accuracy by itself."""
        found = [_right(one, measure) for one in self.answers["questions", name].values()]
        return bounded_mean(found, 0.0, 1.0, alpha)

    def nats_per_token(self, name: str, alpha: float) -> Confidence:
        """Of texts: the logarithm of perplexity."""
        texts = [one for one in self.answers["texts", name].values() if one.tokens]
        return _of_texts(
            [-(one.logprob or 0.0) for one in texts], [float(one.tokens) for one in texts], alpha
        )

    def log_perplexity(self, one: str, base: str, alpha: float) -> Confidence:
        """log of the ratio of perplexities: nats per token of text."""

        def make() -> Confidence:
            pairs = self._pairs("texts", one, base)
            nats = [(theirs.logprob or 0.0) - (ours.logprob or 0.0) for ours, theirs in pairs]
            return _of_texts(nats, [float(theirs.tokens) for _, theirs in pairs], alpha)

        return self._once(("texts", one, base, "perplexity", alpha), make)

    def divergence(self, one: str, base: str, alpha: float) -> Confidence:
        """KL from the base in nats per token, as far as the likeliest tokens show it."""

        def make() -> Confidence:
            found = self._nats(one, base).values()
            return _of_texts([nats for nats, _ in found], [float(tokens) for _, tokens in found], alpha)

        return self._once(("texts", one, base, "kl", alpha), make)

    def closer(self, one: str, other: str, base: str, alpha: float) -> Confidence:
        """By how many nats per token less of KL `one` is from the base than `other`, on the same texts."""
        if one > other:
            return self.closer(other, one, base, alpha).mirrored

        def make() -> Confidence:
            ours, theirs = self._nats(one, base), self._nats(other, base)
            both = [key for key in ours if key in theirs]
            nats = [theirs[key][0] - ours[key][0] for key in both]
            return _of_texts(nats, [float(ours[key][1]) for key in both], alpha)

        return self._once(("texts", one, other, "closer", len(self.answers["texts", base]), alpha), make)

    def _nats(self, name: str, base: str) -> dict[Key, tuple[float, int]]:
        """KL from the base in each text, and its tokens."""
        pairs = [pair for pair in self._pairs("texts", name, base) if pair[0].top and pair[1].top]
        return {ours.key: self._divergence(name, ours, theirs) for ours, theirs in pairs}

    def _once(self, key: tuple[Any, ...], make: Callable[[], Confidence]) -> Confidence:
        """What `make` gives, made anew only once either of the two has more answers. `key`: kind, one, other, …"""
        kind, one, other, *_ = key
        counts = (len(self.answers[kind, one]), len(self.answers[kind, other]))
        known = self._made.get(key)
        if known is None or known[0] != counts:
            known = self._made[key] = (counts, make())
        return known[1]

    def _divergence(self, name: str, ours: Answer, base: Answer) -> tuple[float, int]:
        key = (name, ours.key)
        if key not in self._divergences:
            nats = [kl_lower_bound(p, q) for p, q in zip(base.top, ours.top, strict=False)]
            self._divergences[key] = (sum(nats), len(nats))
        return self._divergences[key]

    def _pairs(self, kind: str, one: str, other: str) -> list[tuple[Answer, Answer]]:
        """Answers of both, in the order of asking; of texts only those of as many tokens."""
        ours, theirs = self.answers[kind, one], self.answers[kind, other]
        pairs = [(mine, theirs[key]) for key, mine in ours.items() if key in theirs]
        if kind == "questions":
            return pairs
        return [(mine, other) for mine, other in pairs if mine.tokens and mine.tokens == other.tokens]

    def wasted_rounds(self, name: str) -> list[str]:
        """Why rounds of a checkpoint failed requests; the generator's own lateness is no fault of the checkpoint."""
        return [
            step["failed"]
            for step in self.steps
            if step["kind"] == "round" and step["checkpoint"] == name and step.get("failed")
        ]


def _right(one: Answer, measure: str) -> float:
    return float((one.acc_norm if measure == "acc_norm" else one.probability) or 0.0)


def _of_texts(sums: Sequence[float], weights: Sequence[float], alpha: float) -> Confidence:
    found = ratio_of_sums(sums, weights, alpha, PLANNED_TEXTS)
    if not 0 < found.n < FEWEST_TEXTS:
        return found

    def reach(n: int) -> float:
        return found.reach(n) if n >= FEWEST_TEXTS else math.inf

    return replace(found, low=-math.inf, high=math.inf, reach=reach)
