"""What to measure next: the measure on which the decision hangs, of the checkpoints on which it hangs. Pure logic.

Each kind of measure (rounds of the load, questions, texts) has open claims; each claim takes about so many more units
of its checkpoints, and a unit takes about so many seconds. The kind with the claim that is settled soonest goes next,
because a checkpoint that drops out costs nothing more. All checkpoints with an open claim of that kind go along: they
share the partner that they are compared with.
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
    for need in needs(decision, evidence):
        if need.available == 0:
            continue
        kind = need.claim.kind
        asked = [claim for claim in decision.hanging if claim.kind == kind]
        names = tuple(dict.fromkeys(name for claim in asked for name in claim.asks))
        if kind == "round":
            return Work(kind, names, 1 + max(max(evidence.rounds[name], default=-1) for name in names))
        fewest = min(evidence.asked(kind, name) for name in names)
        batch = settings.questions if kind == "questions" else settings.texts
        return Work(kind, names, min(evidence.pool[kind], fewest + batch))
    return None
