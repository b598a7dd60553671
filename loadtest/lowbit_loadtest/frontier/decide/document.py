"""The document of a plan that decides: the frontier's own, with the section `decision`. Pure arithmetic on steps.

Every interval in it is a confidence sequence: those of claims share the plan's error, and a checkpoint's own numbers
have the plan's confidence each.
"""

import math
from dataclasses import asdict, replace
from typing import Any

from lowbit_core.evals.arithmetic import Estimate, exponential
from lowbit_core.evals.results import Changes, changes
from lowbit_loadtest.frontier.checkpoint_result import CheckpointResult, Status, component_bytes
from lowbit_loadtest.frontier.decide.allocation import Need, needs
from lowbit_loadtest.frontier.decide.claims import Claim
from lowbit_loadtest.frontier.decide.decision import Decision, claims_of, decide
from lowbit_loadtest.frontier.decide.evidence import Evidence
from lowbit_loadtest.frontier.decide.sequences import Confidence
from lowbit_loadtest.frontier.decide.wording import OBJECTIVES, shown, whole_text
from lowbit_loadtest.frontier.document import head
from lowbit_loadtest.frontier.plan import FrontierPlan
from lowbit_loadtest.frontier.recommendation import Recommendation, constraint_text

Document = dict[str, Any]
VERDICTS = {"winner": "recommended"}


def decided_document(plan: FrontierPlan, evidence: Evidence) -> Document:
    """What all steps say."""
    decision = decide(plan, evidence)
    results = [_result(plan, evidence, one.name) for one in plan.checkpoints if one.name in evidence.facts]
    recommendation = _recommendation(plan, evidence, decision)
    return {
        **head(plan, recommendation, results, evidence.failures),
        "decision": _section(plan, evidence, decision),
        "planned_runs": 0,
        "latency": {},
        "runs": [],
    }


def _section(plan: FrontierPlan, evidence: Evidence, decision: Decision) -> Document:
    assert plan.decide is not None
    return {
        "verdict": decision.verdict,
        "names": list(decision.names),
        "objective": plan.decide.objective,
        "accuracy": plan.decide.accuracy,
        "margins": plan.decide.margins.model_dump(),
        "confidence": plan.decide.confidence,
        "within_s": plan.decide.within,
        "spent_s": evidence.spent_s,
        "claims_in_all": decision.claims,
        "alpha_of_a_claim": decision.alpha,
        "claims": [_claim(claim) for claim in (*decision.told, *decision.hanging)],
        "out": [
            {"name": name, "at_s": evidence.out.get(name, {}).get("at_s"), "reason": reason}
            for name, reason in decision.out.items()
        ],
        "takes": [
            {
                "claim": whole_text(need.claim),
                "kind": need.claim.kind,
                "more": math.ceil(need.units),
                "minutes": need.minutes,
                "available": need.available,
            }
            for need in needs(decision, evidence)
        ],
        "asked": {
            one.name: {kind: evidence.asked(kind, one.name) for kind in ("round", "questions", "texts")}
            for one in plan.checkpoints
        },
        "rounds": {
            one.name: [{"number": number, **values} for number, values in sorted(evidence.rounds[one.name].items())]
            for one in plan.checkpoints
        },
        "timeline": [
            {key: step.get(key) for key in ("kind", "checkpoint", "at_s", "seconds")}
            for step in evidence.steps
            if step.get("seconds") is not None
        ],
    }  # fmt: skip


def _claim(claim: Claim) -> Document:
    """A claim as JSON; values as people read them (ratios, not logarithms)."""
    limit, margin = claim.limit, claim.margin
    return {
        "name": claim.name,
        "kind": claim.kind,
        "one": claim.one,
        "other": claim.other,
        **(asdict(shown(claim)) | ({} if claim.confidence.n else {"value": None})),
        "n": claim.confidence.n,
        "limit": math.exp(limit) if claim.is_log and limit is not None else limit,
        "margin": math.expm1(margin) if claim.is_log and margin is not None else margin,
        "settled": claim.settled,
        "text": whole_text(claim),
    }


def _recommendation(plan: FrontierPlan, evidence: Evidence, decision: Decision) -> Recommendation:
    name = decision.names[0] if decision.verdict == "winner" or len(decision.names) == 1 else None
    verdict: Any = VERDICTS.get(decision.verdict, decision.verdict)
    return Recommendation(verdict, name, tuple(reasons(plan, evidence, decision)), decision.names)


def reasons(plan: FrontierPlan, evidence: Evidence, decision: Decision) -> list[str]:
    """The result in words: what was asked, why it is so, who dropped out when, and what more it would take."""
    assert plan.decide is not None
    margins, minutes = plan.decide.margins, evidence.spent_s / 60
    what = OBJECTIVES[plan.decide.objective]
    lines = [
        f"{what} in {plan.deciding_scenario}, for {constraint_text(plan.constraints)}; equal is within "
        f"{100 * margins.objective:g} % of it, {margins.accuracy:g} of {plan.decide.accuracy} and {margins.kl:g} "
        "nats of KL",
        f"{minutes:.1f} of {plan.decide.within / 60:g} minutes; all statements together hold with "
        f"{plan.decide.confidence:.0%} confidence, however often was looked",
    ]
    if decision.verdict == "undecided":
        lines.append(f"still possible: {', '.join(decision.names)}")
    kept = [
        claim
        for claim in decision.told
        if claim.one in decision.names and claim.settled in ("met", "equal", "no worse")
    ]
    lines += [_kept(claim) for claim in kept]
    for name, reason in decision.out.items():
        at_s = evidence.out.get(name, {}).get("at_s")
        when = "" if at_s is None else f" after {at_s / 60:.1f} minutes"
        lines.append(f"{name} is out{when}: {reason}")
    return lines + [f"open: {_open(need)}" for need in needs(decision, evidence)]


def _open(need: Need) -> str:
    """What is open and what would settle it; of what has no spread yet nobody knows how much that is."""
    text = whole_text(need.claim)
    return text if need.claim.confidence.n < 2 else f"{text}; {need.text} would tell"


def _kept(claim: Claim) -> str:
    text = whole_text(claim)
    words = {"equal": "equal within the margin: ", "no worse": "no worse by more than the margin: "}
    return words.get(claim.settled, "") + text


def _result(plan: FrontierPlan, evidence: Evidence, name: str) -> CheckpointResult:
    """One checkpoint's own numbers, in the form that every frontier has."""
    assert plan.decide is not None
    alpha, base = 1 - plan.decide.confidence, plan.base
    engine = evidence.facts[name]
    speed = evidence.level(name, "throughput", alpha)
    right = {
        measure: _estimate(evidence.right_share(name, alpha, measure))
        for measure in ("acc_norm", "choice_probability")
    }
    kl = None if name == base else _estimate(evidence.divergence(name, base, alpha))
    size = evidence.bytes_of(name)
    return CheckpointResult(
        name=name,
        runs=len(evidence.rounds[name]),
        throughput={plan.deciding_scenario: _exponential(_estimate(speed)) or Estimate(0.0, None, None)},
        acc_norm=right["acc_norm"],
        perplexity=_exponential(_estimate(evidence.nats_per_token(name, alpha))),
        acc_norm_of_base=_of_base(evidence, name, base, alpha),
        perplexity_of_base=_exponential(
            None if name == base else _estimate(evidence.log_perplexity(name, base, alpha))
        ),
        against_base=None if name == base else _against(evidence, name, base, kl),
        quality_under_load=None,
        memory_bytes=component_bytes(engine),
        kv_tokens=engine.get("kv_tokens"),
        statuses=_statuses(plan, evidence, name),
        invalid_points=sum(not values for values in evidence.rounds[name].values()),
        bytes=int(size) if size else None,
        kl_from_base=kl,
        choice_probability=right["choice_probability"],
    )


def _estimate(found: Confidence) -> Estimate | None:
    """None of nothing; an end that is not known yet is None."""
    if found.n == 0:
        return None
    low, high = (end if math.isfinite(end) else None for end in (found.low, found.high))
    return Estimate(found.value, low, high)


def _exponential(one: Estimate | None) -> Estimate | None:
    return exponential(one) if one else None


def _of_base(evidence: Evidence, name: str, base: str, alpha: float) -> Estimate | None:
    """acc_norm as a share of the base's, from the paired difference."""
    level = evidence.right_share(base, alpha, "acc_norm").value
    found = None if name == base else _estimate(evidence.more_right(name, base, alpha, measure="acc_norm"))
    if name == base:
        return Estimate(1.0, 1.0, 1.0)
    if found is None or level == 0 or found.low is None or found.high is None:
        return None
    return Estimate(*(1 + end / level for end in (found.value, found.low, found.high)))


def _against(evidence: Evidence, name: str, base: str, kl: Estimate | None) -> Changes:
    """Flips and the like; the interval of KL is the sequence's."""
    theirs, ours = (
        evidence.answers["questions", one] | evidence.answers["texts", one] for one in (base, name)
    )
    return replace(changes(theirs, ours), kl_lower_bound=kl)


def _statuses(plan: FrontierPlan, evidence: Evidence, name: str) -> dict[str, Status]:
    found: dict[str, Status] = {
        claim.name: _status(claim) for claim in claims_of(plan, evidence).constraints(name)
    }
    limits, base = plan.constraints, evidence.bytes_of(plan.base)
    if limits.bytes_of_base is not None and base:
        found["bytes_of_base"] = "met" if evidence.bytes_of(name) <= limits.bytes_of_base * base else "missed"
    held = evidence.facts[name].get("kv_tokens")
    if limits.kv_tokens is not None:
        found["kv_tokens"] = "undecided" if held is None else "met" if held >= limits.kv_tokens else "missed"
    return found


def _status(claim: Claim) -> Status:
    found = claim.settled
    return found if found == "met" or found == "missed" else "undecided"
