"""What to measure next: the measure on which the decision hangs, of the checkpoints on which it hangs. Pure logic.

Each kind of measure (rounds of the load, questions, texts) has open claims; each claim takes about so many more units
of its checkpoints, and a unit takes about so many seconds. The claim that is cheapest in all goes next, by what it has
cost and what it will: one that always seems near cannot starve the others. Rounds are made of all checkpoints with an
open claim about rounds, so that drift of the machine meets them alike; items of the claim's own only, because the
others may be asked the same ones later.
"""

from dataclasses import dataclass

from lowbit_loadtest.frontier.decide.claims import UNITS, Claim, Kind
from lowbit_loadtest.frontier.decide.decision import Decision
from lowbit_loadtest.frontier.decide.evidence import Evidence
from lowbit_loadtest.frontier.plan import Decide

KINDS: tuple[Kind, ...] = ("texts", "questions", "round")


@dataclass(frozen=True)
class Work:
    """One round: of the load with this number, or of items up to this one, for these checkpoints."""

    kind: Kind
    names: tuple[str, ...]
    upto: int


@dataclass(frozen=True)
class Need:
    """What it would take to settle a claim: more units in all, and minutes. `available` are the items that are left."""

    claim: Claim
    units: float
    minutes: float
    available: int | None

    @property
    def minutes_in_all(self) -> float:
        """With those that its units so far took."""
        return self.minutes * (1 + self.claim.confidence.n / max(1.0, self.units))

    @property
    def text(self) -> str:
        more = f"about {self.units:,.0f} more {UNITS[self.claim.kind]} ({self.minutes:,.0f} minutes)"
        if self.available is not None and self.available < self.units:
            return f"{more}, of which the plan has {self.available:,}"
        return more


def needs(decision: Decision, evidence: Evidence) -> list[Need]:
    """What each open claim would take, the cheapest first."""
    found = []
    for claim in decision.hanging:
        units = claim.more_units()
        seconds = units * sum(evidence.unit_s(claim.kind, name) for name in claim.asks)
        left = None
        if claim.kind in evidence.pool:
            left = evidence.pool[claim.kind] - min(evidence.asked(claim.kind, name) for name in claim.asks)
        found.append(Need(claim, units, seconds / 60, left))
    return sorted(found, key=lambda need: need.minutes)


def next_work(decision: Decision, evidence: Evidence, settings: Decide) -> Work | None:
    """The round that the decision wants next; None where no open claim can be asked more."""
    for need in sorted(needs(decision, evidence), key=lambda need: need.minutes_in_all):
        if need.available == 0:
            continue
        kind = need.claim.kind
        asked = (
            [claim for claim in decision.hanging if claim.kind == kind] if kind == "round" else [need.claim]
        )
        names = tuple(dict.fromkeys(name for claim in asked for name in claim.asks))
        if kind == "round":
            return Work(kind, names, 1 + max(max(evidence.rounds[name], default=-1) for name in names))
        fewest = min(evidence.asked(kind, name) for name in names)
        batch = settings.questions if kind == "questions" else settings.texts
        return Work(kind, names, min(evidence.pool[kind], fewest + batch))
    return None
