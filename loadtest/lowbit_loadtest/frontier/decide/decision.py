"""Which checkpoint wins, which are equal, or what is still open: pure logic on claims.

Possible are the checkpoints that miss no constraint. F is the fastest of them as far as measured; the others are slower
than F or than another possible one (out, while that is possible), equal to F within the margin, or open. Of F and its
equals G is the most accurate; the others are less accurate (out), equal, or open. The result is G with its equals, once
no claim about them, about F and about those that beat others is open: a winner if G is alone. It is told relative to F
and G because "equal within a margin" does not chain.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lowbit_loadtest.frontier.decide.claims import Claim, Claims
from lowbit_loadtest.frontier.decide.evidence import WASTED, Evidence
from lowbit_loadtest.frontier.decide.wording import claim_text, comparison_text
from lowbit_loadtest.frontier.plan import FrontierPlan

Verdict = Literal["winner", "equal", "none", "undecided"]


@dataclass(frozen=True)
class Decision:
    """`names`: the winner, the equal ones, or those that may still be. `out` says why each of the others is not.

    `hanging` are the open claims on which it hangs; `told` the settled ones that it rests on.
    """

    verdict: Verdict
    names: tuple[str, ...]
    out: Mapping[str, str]
    hanging: tuple[Claim, ...]
    told: tuple[Claim, ...]
    alpha: float
    claims: int


def decide(plan: FrontierPlan, evidence: Evidence) -> Decision:
    """What the evidence says so far."""
    out = _out_without_measuring(plan, evidence)
    claims = claims_of(plan, evidence)
    constraints = {one.name: claims.constraints(one.name) for one in plan.checkpoints if one.name not in out}
    told: list[Claim] = []
    for name, found in constraints.items():
        missed = [claim for claim in found if claim.settled == "missed"]
        if missed:
            out[name] = "; ".join(map(claim_text, missed))
            told += missed
    possible = [name for name in constraints if name not in out]
    if not possible:
        return Decision("none", (), out, (), tuple(told), claims.alpha, claims.count)
    return _among(plan, claims, constraints, possible, out, told)


def claims_of(plan: FrontierPlan, evidence: Evidence) -> Claims:
    """The claims about those that are small enough, which is known before anything is measured."""
    too_big = _too_big(plan, evidence)
    return Claims(plan, evidence, tuple(one.name for one in plan.checkpoints if one.name not in too_big))


def _among(
    plan: FrontierPlan,
    claims: Claims,
    constraints: Mapping[str, Sequence[Claim]],
    possible: Sequence[str],
    out: dict[str, str],
    told: list[Claim],
) -> Decision:
    by_speed = _compared(possible, claims.faster)
    by_accuracy = _compared(by_speed.stay, claims.more_right)
    out |= {claim.other or "": comparison_text(claim) for claim in (*by_speed.worse, *by_accuracy.worse)}
    members = {by_speed.leader, *by_speed.needed, *by_accuracy.needed, *by_accuracy.stay}
    limits = [claim for name in possible if name in members for claim in constraints[name]]
    open_limits = [claim for claim in limits if claim.settled == "undecided"]
    told += [*by_speed.settled, *by_accuracy.settled, *(one for one in limits if one.settled != "undecided")]
    hanging = (*by_speed.open, *by_accuracy.open, *open_limits)
    last = [name for name in possible if name not in out]
    verdict: Verdict = "undecided" if hanging else "winner" if len(last) == 1 else "equal"
    return Decision(verdict, tuple(last), out, hanging, tuple(told), claims.alpha, claims.count)


@dataclass(frozen=True)
class Compared:
    """The leader of some checkpoints with its equals (`stay`), and claims about the others."""

    leader: str
    stay: tuple[str, ...]
    equal: tuple[Claim, ...]
    worse: tuple[Claim, ...]
    open: tuple[Claim, ...]

    @property
    def settled(self) -> tuple[Claim, ...]:
        return (*self.equal, *self.worse)

    @property
    def needed(self) -> tuple[str, ...]:
        """Whose constraints matter too: who beats another must keep them, and who is open may yet be the result."""
        return (*(claim.one for claim in self.worse), *(claim.other or "" for claim in self.open))


def _compared(names: Sequence[str], compare: Callable[[str, str], Claim]) -> Compared:
    """Each against the leader; one that is open there is out all the same if another surely beats it."""
    leader = _leader(names, compare)
    equal, worse, still_open = list[Claim](), list[Claim](), list[Claim]()
    for name in names:
        if name == leader:
            continue
        claim = compare(leader, name)
        beaten = [claim] if claim.settled == "better" else []
        if claim.settled == "undecided":
            others = (compare(other, name) for other in names if other not in (leader, name))
            beaten = [one for one in others if one.settled == "better"][:1]
        if claim.settled == "equal":
            equal.append(claim)
        elif beaten:
            worse += beaten
        else:
            still_open.append(claim)
    stay = (leader, *(claim.other or "" for claim in equal))
    return Compared(leader, stay, tuple(equal), tuple(worse), tuple(still_open))


def _leader(names: Sequence[str], compare: Callable[[str, str], Claim]) -> str:
    """The best by value; another takes its place where it is surely better in what the two did together."""
    best = names[0]
    for name in names[1:]:
        if compare(name, best).confidence.value > 0:
            best = name
    for name in names:
        if name != best and compare(best, name).settled == "worse":
            best = name
    return best


def _out_without_measuring(plan: FrontierPlan, evidence: Evidence) -> dict[str, str]:
    """What did not start, is too big, holds too few tokens, or fails requests."""
    out = {name: f"could not be served: {reason}" for name, reason in evidence.failures.items()}
    out |= _too_big(plan, evidence)
    wanted = plan.constraints.kv_tokens
    for name, facts in evidence.facts.items():
        held = facts.get("kv_tokens")
        if wanted is not None and held is not None and held < wanted:
            out[name] = f"holds {held:,} KV tokens, below {wanted:,}"
    for one in plan.checkpoints:
        wasted = evidence.wasted_rounds(one.name)
        if len(wasted) >= WASTED:
            out[one.name] = f"fails requests: {wasted[-1]}"
    return out


def _too_big(plan: FrontierPlan, evidence: Evidence) -> dict[str, str]:
    limit, base = plan.constraints.bytes_of_base, evidence.bytes_of(plan.base)
    if limit is None or not base:
        return {}
    shares = {one.name: evidence.bytes_of(one.name) / base for one in plan.checkpoints}
    return {
        name: f"has {share:.2f} of the base's bytes, above {limit:g}"
        for name, share in shares.items()
        if share > limit
    }
