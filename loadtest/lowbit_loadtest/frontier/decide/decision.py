"""Which checkpoint wins, which are equal, or what is still open: pure logic on claims.

Possible are the checkpoints that miss no constraint. They are compared by the objective, then by accuracy, then by KL
from the base, then by bytes of weights and KV tokens: who is surely behind another in one (and not equal to it within
the margin) is no rival in the next. Whoever stands in the end is named once it is surely *no worse than any other by
more than the margin* in each: an epsilon-best one (Kalyanakrishnan, Tewari, Auer and Stone 2012, "PAC subset selection
in stochastic multi-armed bandits", ICML: LUCB; Garivier and Kaufmann 2021, "Nonasymptotic sequential tests for
overlapping hypotheses applied to near-optimal arm identification", arXiv 1905.03495). That it is better, or equal, need
not be known: one that is 1 % faster is shown to be no 3 % slower by a sixteenth of what shows it to be faster.

Of several that are near enough the later measures name one, so that chance does not: KL takes few texts. Stages, and
not pairs, because "equal within a margin" does not chain: pair by pair, everybody may be out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lowbit_loadtest.frontier.decide.claims import Claim, Claims
from lowbit_loadtest.frontier.decide.evidence import WASTED, Evidence
from lowbit_loadtest.frontier.decide.wording import claim_text, comparison_text
from lowbit_loadtest.frontier.plan import FrontierPlan

Verdict = Literal["winner", "equal", "none", "undecided"]
Compare = Callable[[str, str], Claim]
SAME_SIZE = 0.01  # a share of bytes, or of KV tokens, that is no difference


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
    stages = _stages(possible, claims.comparisons)
    last, sizes = _by_size(stages[-1].stay, claims.evidence)
    needed = [claim for stage in stages for claim in stage.needed(last)]
    beaten = [claim for stage in stages for claim in stage.worse]
    sure = [claim for place, stage in enumerate(stages) for claim in stage.worse
            if all(before.compare(claim.one, claim.other or "").is_no_worse for before in stages[:place])]  # fmt: skip
    members = {*last, *(claim.one for claim in beaten)}  # who beats another must keep its own limits
    needed += [claim for name in possible if name in members for claim in constraints[name]]
    hanging = tuple(claim for claim in needed if claim.settled == "undecided")
    out |= {claim.other or "": comparison_text(claim) for claim in (sure if hanging else beaten)}
    out |= {} if hanging else sizes
    told += [*(sure if hanging else beaten), *(claim for claim in needed if claim.settled != "undecided")]
    names = [name for name in possible if name not in out] if hanging else last
    verdict: Verdict = "undecided" if hanging else "winner" if len(names) == 1 else "equal"
    return Decision(verdict, tuple(names), out, hanging, tuple(told), claims.alpha, claims.count)


@dataclass(frozen=True)
class Stage:
    """One comparison of those that stood before it: who stays, and the claims by which the others are behind."""

    compare: Compare
    stay: tuple[str, ...]
    worse: tuple[Claim, ...]

    def needed(self, last: Sequence[str]) -> list[Claim]:
        """That each of `last` is near enough to all that stay; of two of them once, from both sides.

        Who does not stay is behind one that does, and so needs no claim of its own.
        """
        found = []
        for place, name in enumerate(last):
            for other in self.stay:
                if other not in last:
                    found.append(replace(self.compare(name, other), one_sided=True))
                elif other in last[place + 1 :]:
                    found.append(self.compare(name, other))
        return found


def _stages(possible: Sequence[str], comparisons: Sequence[Compare]) -> list[Stage]:
    stages = list[Stage]()
    for compare in comparisons:
        stages.append(_stage(stages[-1].stay if stages else possible, compare))
    return stages


def _stage(names: Sequence[str], compare: Compare) -> Stage:
    """Who is behind another is told by one that stays: of whoever beats it, only that one must keep its limits."""
    pairs = [compare(other, name) for name in names for other in names if other != name]
    better = [claim for claim in pairs if claim.settled == "better"]
    behind = {claim.other for claim in better}
    stay = tuple(name for name in names if name not in behind)
    if not stay:  # a circle: one of the claims errs
        return Stage(compare, tuple(names), ())
    better.sort(key=lambda claim: (claim.one in stay, claim.confidence.value))  # the last counts
    return Stage(compare, stay, tuple({claim.other: claim for claim in better}.values()))


def _by_size(names: Sequence[str], evidence: Evidence) -> tuple[tuple[str, ...], dict[str, str]]:
    """Of those that nothing measured tells apart: the smallest, and of these the ones that hold the most tokens."""
    sizes = {name: evidence.bytes_of(name) for name in names}
    tokens = {name: evidence.facts.get(name, {}).get("kv_tokens") for name in names}
    small = min(sizes.values())
    stay = [name for name in names if sizes[name] <= small * (1 + SAME_SIZE)] if small else list(names)
    out = {name: f"as good, and has {sizes[name]:,.0f} bytes of weights against {small:,.0f}"
           for name in names if name not in stay}  # fmt: skip
    if any(tokens[name] is None for name in stay):
        return tuple(stay), out
    most = max(tokens[name] or 0 for name in stay)
    roomy = [name for name in stay if (tokens[name] or 0) >= most * (1 - SAME_SIZE)]
    out |= {name: f"as good, and holds {tokens[name]:,} KV tokens against {most:,}"
            for name in stay if name not in roomy}  # fmt: skip
    return tuple(roomy), out


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
