"""What a candidate comes to beside the targets: predicted, limit and margin of each; and what a miss would take."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lowbit_core.kv_cache import GIB
from lowbit_plan.candidates import Candidate
from lowbit_plan.latency import Latency, Speeds, predicted
from lowbit_plan.place import Place
from lowbit_plan.sections import checkpoint_bytes
from lowbit_plan.targets import Targets
from lowbit_plan.work import work_of
from lowbit_quantize.check import forecast

CONTEXT_STEP = 128
MEMORY, ITL, TTFT, KL = "memory", "inter-token latency", "time to first token", "mean KL"


@dataclass(frozen=True)
class Check:
    """One target: what is predicted (None: not known), and the limit."""

    target: str
    predicted: float | None
    limit: float

    @property
    def met(self) -> bool:
        return self.predicted is not None and self.predicted <= self.limit

    @property
    def margin(self) -> float | None:
        """How much of the limit is left; negative where it is missed."""
        return None if self.predicted is None else 1 - self.predicted / self.limit


@dataclass(frozen=True)
class Verdict:
    """A candidate's bytes, tokens of cache and latencies, and each target that was set."""

    candidate: Candidate
    weights_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int  # that fit beside the weights
    needed_bytes: int
    itl: Latency
    ttft: Latency
    checks: tuple[Check, ...]
    takes: tuple[str, ...]  # what each missed target would take

    @property
    def met(self) -> bool:
        return all(check.met for check in self.checks)

    @property
    def distance(self) -> float:
        """The factor by which the worst target is missed; 1 or less where all are met."""
        return max(
            float("inf") if check.predicted is None else check.predicted / check.limit
            for check in self.checks
        )

    @property
    def order(self) -> tuple[bool, float, float, int]:
        """Of two that meet the targets the one that loses less is better, then the smaller one."""
        return (*self.candidate.rank, self.needed_bytes)


def judge(candidate: Candidate, place: Place, speeds: Speeds, targets: Targets) -> Verdict:
    """Predict a candidate and hold it against the targets."""
    plan = candidate.plan
    weights = checkpoint_bytes(plan)
    kv_bytes = place.kv_bytes(plan, targets.streams, targets.context)
    needed = int((weights + kv_bytes + place.runtime) / place.share)
    itl, ttft = predicted(work_of(plan), speeds, targets)
    checks = [Check(MEMORY, needed, targets.fit_bytes)]
    if targets.itl_s is not None:
        checks.append(Check(ITL, itl.total, targets.itl_s))
    if targets.ttft_s is not None:
        checks.append(Check(TTFT, ttft.total, targets.ttft_s))
    if targets.max_kld is not None:
        checks.append(Check(KL, candidate.kl, targets.max_kld))
    tokens = place.kv_tokens(plan, weights, targets.fit_bytes)
    takes = [words for check in checks if not check.met for words in _takes(check, targets, tokens)]
    return Verdict(
        candidate, weights, kv_bytes, forecast.kv_bytes_per_token(plan, 1), tokens, needed, itl, ttft,
        tuple(checks), tuple(takes),
    )  # fmt: skip


def _takes(check: Check, targets: Targets, tokens: int) -> Iterator[str]:
    """What a missed target would take, in words with flags."""
    if check.target == MEMORY:
        assert check.predicted is not None
        needed = check.predicted / GIB
        words = f"needs {needed:.2f} GiB, {needed - check.limit / GIB:.2f} more"
        context = tokens // targets.streams // CONTEXT_STEP * CONTEXT_STEP
        if context:
            words += f"; or --context {context}"
            words += f" --prompt {context // 2}" if context <= targets.prompt else ""
        streams = tokens // (-(-targets.context // CONTEXT_STEP) * CONTEXT_STEP)
        if 0 < streams < targets.streams:
            words += f"; or --streams {streams}"
        yield words
    elif check.target == KL:
        yield (
            "its KL is not known before it is pruned"
            if check.predicted is None
            else f"loses {check.predicted:.3g} nats a token: --max-kld {_up(check.predicted):g}"
        )
    else:
        assert check.predicted is not None
        flag = "--itl-ms" if check.target == ITL else "--ttft-ms"
        if check.predicted == float("inf"):
            yield f"{check.target}: the engine has no kernel for it here"
        else:
            yield f"{check.target} {1e3 * check.predicted:.1f} ms: {flag} {_up(1e3 * check.predicted):g}"


def _up(number: float) -> float:
    """The next number of two digits, or of whole units, at or above this one."""
    unit = 1.0
    while number < 10 * unit:
        unit /= 10
    return math.ceil(number / unit) * unit


def sorted_by_fit(verdicts: Sequence[Verdict]) -> tuple[list[Verdict], list[Verdict]]:
    """Those that meet every target, best first, and the others, nearest first."""
    met = sorted((one for one in verdicts if one.met), key=lambda one: one.order)
    missed = sorted((one for one in verdicts if not one.met), key=lambda one: (one.distance, one.order))
    return met, missed
