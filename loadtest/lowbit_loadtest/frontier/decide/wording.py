"""Claims in words, with their intervals."""

import math

from lowbit_core.evals.arithmetic import Estimate, span
from lowbit_loadtest.frontier.decide.claims import UNITS, Claim

NAMES = {
    "acc_norm_of_base": "acc_norm of base",
    "choice_probability_of_base": "choice probability of base",
    "kl_from_base": "KL from base, nats",
    "perplexity_of_base": "perplexity of base",
    "ttft_s": "p95 time to first token, s",
    "time_per_output_token_s": "p95 time per output token, s",
    "end_to_end_s": "p95 end to end, s",
    "acc_norm": "acc_norm",
    "choice_probability": "choice probability",
    "kl": "KL from base",
}
OBJECTIVES = {
    "throughput": "output tokens/s",
    "goodput": "good requests/s",
    "latency": "mean end-to-end s",
    "cost": "money per million output tokens",
}


def shown(claim: Claim) -> Estimate:
    """The value as people read it: ratios for logarithms, None for ends that are not known yet."""
    found = claim.confidence
    turn = math.exp if claim.is_log else float
    low, high = (turn(end) if math.isfinite(end) else None for end in (found.low, found.high))
    return Estimate(turn(found.value), low, high)


def whole_text(claim: Claim) -> str:
    """A claim with the checkpoint that it is about."""
    return comparison_text(claim) if claim.margin is not None else f"{claim.one}: {claim_text(claim)}"


def claim_text(claim: Claim) -> str:
    """A constraint: what was found against its limit."""
    if claim.margin is not None:
        return comparison_text(claim)
    if claim.confidence.n == 0:
        return f"{NAMES[claim.name]} is not measured yet"
    units = f"{claim.confidence.n:,} {UNITS[claim.kind]}"
    if claim.name.endswith("_of_base") and claim.kind == "questions":
        slack = _points(claim)
        return f"{NAMES[claim.name]}: {slack} points from the limit, {units}"
    limit = math.exp(claim.limit or 0.0) if claim.is_log else claim.limit or 0.0
    return f"{NAMES[claim.name]} {span(shown(claim), '{:.3f}')}, limit {limit:.4g}, {units}"


def comparison_text(claim: Claim) -> str:
    """How `other` stands to `one`, which leads."""
    units = f"{claim.confidence.n:,} {UNITS[claim.kind]}"
    if claim.confidence.n == 0:
        name = NAMES.get(claim.name) or OBJECTIVES[claim.name]
        return f"{claim.one} and {claim.other} are not compared yet in {name}"
    if claim.kind == "texts":
        less = span(shown(claim), "{:.4f}")
        return f"{_stands(claim, less, 'nats of KL nearer to the base than')}, {units}"
    if claim.kind == "questions":
        return f"{_stands(claim, _points(claim), 'points better than')} in {NAMES[claim.name]}, {units}"
    percent = _hundredfold(shown(claim), less=1.0)
    gain = span(percent, "{:.1f}")
    return f"{_stands(claim, gain, '% better than')} in {OBJECTIVES[claim.name]}, {units}"


def _stands(claim: Claim, by: str, words: str) -> str:
    """One that is behind is not called better by less than nothing."""
    if claim.confidence.value >= 0:
        return f"{claim.one} is {by} {words} {claim.other}"
    return f"{claim.one} against {claim.other}: {by} {words.removesuffix(' than')}"


def _points(claim: Claim) -> str:
    return span(_hundredfold(shown(claim)), "{:.2f}")


def _hundredfold(one: Estimate, less: float = 0.0) -> Estimate:
    low, high = (None if end is None else 100 * (end - less) for end in (one.low, one.high))
    return Estimate(100 * (one.value - less), low, high)
