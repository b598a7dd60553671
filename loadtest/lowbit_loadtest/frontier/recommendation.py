"""Which checkpoint to serve, or why the data cannot decide: pure logic on what is known of each.

A checkpoint is certain when it meets every constraint, and possible when it misses none. The fastest certain one is
recommended when every other possible one is surely slower; otherwise the result is undecided and says why.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from lowbit_core.evals.arithmetic import Estimate, span
from lowbit_loadtest.frontier.checkpoint_result import CheckpointResult, Status
from lowbit_loadtest.frontier.plan import Constraints, FrontierPlan

WORDS = {
    "acc_norm_of_base": "acc_norm of base",
    "perplexity_of_base": "perplexity of base",
    "latency": "latency at every rate",
    "kl_from_base": "KL from base",
    "bytes_of_base": "bytes of base",
    "kv_tokens": "KV tokens",
}


@dataclass(frozen=True)
class Recommendation:
    """`name` is the checkpoint to serve; where `undecided`, the one that leads."""

    verdict: Literal["recommended", "equal", "undecided", "none"]
    name: str | None
    reasons: tuple[str, ...]
    names: tuple[str, ...] = ()  # the equal ones

    @property
    def title(self) -> str:
        """The result in one line."""
        return {
            "recommended": f"Serve {self.name}",
            "equal": f"Equal within the margins: {', '.join(self.names)}",
            "undecided": "The data cannot decide",
            "none": "Nothing meets the constraints",
        }[self.verdict]


def recommend(
    plan: FrontierPlan, results: Sequence[CheckpointResult], failures: Collection[str] = ()
) -> Recommendation:
    """The fastest, in the plan's objective, of those that meet every constraint, if the data can tell.

    `failures` are checkpoints that could not be served; the decision does not wait for them.
    """
    scenario = plan.objective or plan.scenarios[0].name
    wanted = constraint_text(plan.constraints)
    possible = [one for one in results if "missed" not in one.statuses.values()]
    missed = [
        f"{one.name} misses {', '.join(_with(one, 'missed'))}" for one in results if one not in possible
    ]
    if not possible:
        return Recommendation("none", None, (f"no checkpoint keeps {wanted}", *missed))
    certain = [one for one in possible if "undecided" not in one.statuses.values()]
    leader = max(certain or possible, key=lambda one: one.throughput[scenario].value)
    seen = {one.name for one in results} | set(failures)
    doubts = [f"{one.name} was not measured yet" for one in plan.checkpoints if one.name not in seen]
    doubts += [
        _doubt(plan, one)
        for one in possible
        if one not in certain and not _surely_slower(one, leader, scenario)
    ]
    doubts += [
        f"{one.name}: the generator fell behind in {one.invalid_points} measurements; repeat them on an idle machine"
        for one in possible
        if one.invalid_points
    ]
    rivals = [
        f"{one.name} may be as fast: {_speed(one, scenario)} against {_speed(leader, scenario)}; "
        "more repetitions would tell"
        for one in certain
        if one is not leader and not _surely_slower(one, leader, scenario)
    ]
    if not certain or doubts or rivals:
        lead = f"undecided for {wanted}; {leader.name} leads with {_speed(leader, scenario)} in {scenario}"
        return Recommendation("undecided", leader.name, (lead, *doubts, *rivals, *missed))
    why = f"{leader.name} for {wanted}: {_speed(leader, scenario)} in {scenario}, and every other is slower or misses"
    return Recommendation("recommended", leader.name, (why, *missed))


def constraint_text(constraints: Constraints) -> str:
    """The constraints in words."""
    parts = []
    if constraints.acc_norm_of_base is not None:
        parts.append(f"at least {constraints.acc_norm_of_base:.0%} of the base's acc_norm")
    if constraints.perplexity_of_base is not None:
        parts.append(f"at most {constraints.perplexity_of_base:g} times its perplexity")
    if constraints.choice_probability_of_base is not None:
        parts.append(f"at least {constraints.choice_probability_of_base:.0%} of its choice probability")
    if constraints.kl_from_base is not None:
        parts.append(f"at most {constraints.kl_from_base:g} nats of KL from it")
    if constraints.bytes_of_base is not None:
        parts.append(f"at most {constraints.bytes_of_base:g} of its bytes")
    if constraints.kv_tokens is not None:
        parts.append(f"at least {constraints.kv_tokens:,} KV tokens")
    names = {
        "ttft_s": "TTFT",
        "time_per_output_token_s": "time per output token",
        "end_to_end_s": "end to end",
    }
    parts += [
        f"p95 {names[name]} up to {1000 * limit:g} ms" for name, limit in constraints.latencies_s.items()
    ]
    return ", ".join(parts) or "no constraints"


def _with(one: CheckpointResult, wanted: Status) -> list[str]:
    return [WORDS[name] for name, found in one.statuses.items() if found == wanted]


def _speed(one: CheckpointResult, scenario: str) -> str:
    speed = one.throughput[scenario]
    spread = (
        f" [{speed.low:.0f}–{speed.high:.0f}]" if speed.low is not None and speed.high is not None else ""
    )
    return f"{speed.value:.0f}{spread} tokens/s"


def _surely_slower(one: CheckpointResult, leader: CheckpointResult, scenario: str) -> bool:
    mine, theirs = one.throughput[scenario], leader.throughput[scenario]
    return mine.high is not None and theirs.low is not None and mine.high < theirs.low


def _doubt(plan: FrontierPlan, one: CheckpointResult) -> str:
    """Which constraints are undecided, and about how many items would decide them."""
    limits = {
        "acc_norm_of_base": (one.acc_norm_of_base, plan.constraints.acc_norm_of_base),
        "perplexity_of_base": (one.perplexity_of_base, plan.constraints.perplexity_of_base),
        "kl_from_base": (one.kl_from_base, plan.constraints.kl_from_base),
        "bytes_of_base": (None, plan.constraints.bytes_of_base),
        "kv_tokens": (None, plan.constraints.kv_tokens),
    }
    texts = [
        _undecided(WORDS[name], estimate, limit or 1.0)
        for name, (estimate, limit) in limits.items()
        if one.statuses.get(name) == "undecided"
    ]
    return f"{one.name}: {'; '.join(texts)}"


def _undecided(name: str, one: Estimate | None, limit: float) -> str:
    if one is None or one.low is None or one.high is None:
        return f"{name} is unknown"
    text = f"{name} {span(one, '{:.3f}')} includes {limit:g}"
    if one.value == limit:
        return text
    factor = ((one.high - one.low) / 2 / (one.value - limit)) ** 2
    return f"{text} (about {max(2, math.ceil(factor))} times the items would tell)"
