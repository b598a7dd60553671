"""What has to be known before a frontier is decided: one claim for each thing that may be wrong. Pure logic.

A claim has a confidence sequence and is settled by it: a constraint is `met` or `missed`, a comparison `better`,
`worse` or `equal`, or it is `undecided`. A one-sided comparison is settled by less: that `one` is `no worse` than
`other` by more than the margin, which is all that a winner must be. All claims that a plan could ever make share the
permitted error (union bound, Bonferroni), four fifths of it the comparisons by objective and accuracy, which take the
time; both sides of a comparison are one claim. So no statement of the result is wrong with that confidence, however the
candidates were chosen and whenever the measuring ended.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lowbit_loadtest.frontier.decide.evidence import FEWEST_TEXTS, Evidence
from lowbit_loadtest.frontier.decide.sequences import MOST_UNITS, Confidence
from lowbit_loadtest.frontier.plan import FrontierPlan

Kind = Literal["round", "questions", "texts"]
Settled = Literal["met", "missed", "better", "worse", "equal", "no worse", "undecided"]
SLOW_PART = 0.8  # of the permitted error
FIRST_UNITS = 8.0  # of what nothing is known yet
UNITS = {"round": "rounds", "questions": "questions", "texts": "texts"}


@dataclass(frozen=True)
class Claim:
    """`one` keeps a limit, or is better than `other`. `limit` is a constraint's, `margin` a comparison's.

    `kind` is what more of would settle it. Confidences are of logarithms where `is_log`.
    """

    name: str
    kind: Kind
    one: str
    other: str | None
    confidence: Confidence
    limit: float | None = None
    margin: float | None = None
    at_least: bool = True
    is_log: bool = False
    one_sided: bool = False
    base: str | None = None  # of a comparison that needs the base's answers too

    @property
    def settled(self) -> Settled:
        found = self.confidence
        if self.margin is not None:
            if found.within(self.margin):
                return "equal"
            if self.one_sided and self.is_no_worse and found.low <= 0:
                return "no worse"
            return "better" if found.low > 0 else "worse" if found.high < 0 else "undecided"
        limit = self.limit or 0.0
        if self.at_least:
            return "met" if found.low >= limit else "missed" if found.high < limit else "undecided"
        return "met" if found.high <= limit else "missed" if found.low > limit else "undecided"

    @property
    def is_no_worse(self) -> bool:
        """Whether `one` is surely not worse by more than the margin."""
        return self.confidence.low > -(self.margin or 0.0)

    @property
    def asks(self) -> tuple[str, ...]:
        """Which checkpoints more is asked of."""
        return tuple(dict.fromkeys(name for name in (self.one, self.other, self.base) if name is not None))

    def more_units(self) -> float:
        """About how many more units settle it, if value and spread stay."""
        found = self.confidence
        if self.settled != "undecided":
            return 0.0
        if found.n < 2:
            return FIRST_UNITS
        if self.margin is not None and self.one_sided:
            needed = max(-found.value, self.margin + found.value)
        elif self.margin is not None:
            needed = max(abs(found.value), self.margin - abs(found.value))
        else:
            needed = abs(found.value - (self.limit or 0.0))
        until = found.units_until(needed)
        return float(MOST_UNITS) if until is None else float(max(1, until - found.n))


class Claims:
    """The claims of a plan on what is known so far."""

    def __init__(self, plan: FrontierPlan, evidence: Evidence, candidates: tuple[str, ...]) -> None:
        assert plan.decide is not None
        self.plan, self.decide, self.evidence = plan, plan.decide, evidence
        error = 1 - self.decide.confidence
        slow, quick = self._counts(candidates)
        self.count = slow + quick
        part = 0.0 if not slow else SLOW_PART if quick else 1.0
        self.alpha, self.quick_alpha = part * error / max(1, slow), (1 - part) * error / max(1, quick)

    def _counts(self, candidates: tuple[str, ...]) -> tuple[int, int]:
        """How many claims could ever be made: pairs by objective and accuracy; pairs by KL, and limits."""
        limits = self.plan.constraints
        n, others = len(candidates), sum(name != self.plan.base for name in candidates)
        of_quality = (self._accuracy_share, limits.kl_from_base, limits.perplexity_of_base)
        quality = others * sum(limit is not None for limit in of_quality)
        pairs = n * (n - 1) // 2
        return 2 * pairs, quality + n * len(limits.latencies_s) + pairs * (len(self.comparisons) - 2)

    @property
    def comparisons(self) -> tuple[Callable[[str, str], Claim], ...]:
        """What two checkpoints are compared by, the weightiest first; by KL where the plan has texts."""
        has_texts = self.evidence.pool.get("texts", 0) >= FEWEST_TEXTS
        return (self.faster, self.more_right, *((self.closer,) if has_texts else ()))

    @property
    def _accuracy_share(self) -> float | None:
        limits = self.plan.constraints
        return (
            limits.acc_norm_of_base
            if self.decide.accuracy == "acc_norm"
            else limits.choice_probability_of_base
        )

    @property
    def compares_quality(self) -> bool:
        """Whether any constraint needs the base's answers."""
        limits = (
            self._accuracy_share,
            self.plan.constraints.kl_from_base,
            self.plan.constraints.perplexity_of_base,
        )
        return any(limit is not None for limit in limits)

    def constraints(self, name: str) -> list[Claim]:
        """The measured constraints of one checkpoint; the base keeps those of quality by being the base."""
        found = [] if name == self.plan.base else self._of_quality(name)
        return found + [
            Claim(measure, "round", name, None, self.evidence.level(name, measure, self.quick_alpha), math.log(limit),
                  at_least=False, is_log=True)
            for measure, limit in self.plan.constraints.latencies_s.items()
        ]  # fmt: skip

    def _of_quality(self, name: str) -> list[Claim]:
        base, limits, evidence, alpha = self.plan.base, self.plan.constraints, self.evidence, self.quick_alpha
        found = []
        if (share := self._accuracy_share) is not None:
            slack = evidence.more_right(name, base, alpha, share)
            found.append(Claim(f"{self.decide.accuracy}_of_base", "questions", name, base, slack, 0.0))
        if limits.kl_from_base is not None:
            nats = evidence.divergence(name, base, alpha)
            found.append(
                Claim("kl_from_base", "texts", name, base, nats, limits.kl_from_base, at_least=False)
            )
        if limits.perplexity_of_base is not None:
            ratio = evidence.log_perplexity(name, base, alpha)
            limit = math.log(limits.perplexity_of_base)
            found.append(
                Claim("perplexity_of_base", "texts", name, base, ratio, limit, at_least=False, is_log=True)
            )
        return found

    def faster(self, one: str, other: str) -> Claim:
        """The objective of two checkpoints, compared."""
        found = self.evidence.faster(one, other, self.alpha)
        margin = math.log1p(self.decide.margins.objective)
        return Claim(self.decide.objective, "round", one, other, found, margin=margin, is_log=True)

    def more_right(self, one: str, other: str) -> Claim:
        """The accuracy of two checkpoints, compared item by item."""
        found = self.evidence.more_right(one, other, self.alpha)
        return Claim(
            self.decide.accuracy, "questions", one, other, found, margin=self.decide.margins.accuracy
        )

    def closer(self, one: str, other: str) -> Claim:
        """KL from the base of two checkpoints, compared text by text."""
        base = self.plan.base
        found = self.evidence.closer(one, other, base, self.quick_alpha)
        return Claim("kl", "texts", one, other, found, margin=self.decide.margins.kl, base=base)
