"""Completed, rejected and failed: compared before anything else, as counts and shares with their intervals.

A share's own interval is Wilson's (1927). The difference of two has Newcombe's (1998, method 10), which is right for 0
and 100 % too; where the requests are known it is widened by a bootstrap over blocks of them, because failures come
together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lowbit_core.evals.arithmetic import Estimate, wilson
from lowbit_loadtest.compare.side import COMPLETED, NOT_SENT, OUTCOMES, At, Load
from lowbit_loadtest.report.statistics import Bounds, Sample, bounds_of, request_weights

Verdict = Literal["better", "worse", "same", "undecided"]
DRAWS = 500


@dataclass(frozen=True)
class OutcomeShare:
    """One way to end at one load. `change` is B's share − A's; only that of completed requests has a verdict."""

    outcome: str
    at: At
    count_a: int
    count_b: int
    share_a: Estimate
    share_b: Estimate
    change: float
    interval: Bounds
    verdict: Verdict | None


def outcome_shares(
    a: Load, b: Load, tolerance: float, seed: int = 0, draws: int = DRAWS
) -> list[OutcomeShare]:
    """Every way to end that was seen on either side, completed first; nothing of a load without requests."""
    if not a.total or not b.total:
        return []
    seen = [name for name in OUTCOMES if name == COMPLETED or a.counts.get(name) or b.counts.get(name)]
    drawn = _bootstrap(seen, a, b, seed, draws)
    return [_share(name, a, b, tolerance, drawn.get(name)) for name in seen]


def _share(name: str, a: Load, b: Load, tolerance: float, drawn: Bounds | None) -> OutcomeShare:
    count_a, count_b = a.counts.get(name, 0), b.counts.get(name, 0)
    share_a, share_b = wilson(count_a, a.total), wilson(count_b, b.total)
    change, interval = share_b.value - share_a.value, newcombe(share_a, share_b)
    if drawn is not None:
        interval = Bounds(min(interval.low, drawn.low), max(interval.high, drawn.high))
    verdict = None
    if name == COMPLETED:
        whole = count_a == a.total and count_b == b.total
        verdict = "same" if whole else _judged(count_a, count_b, change, interval, tolerance)
    return OutcomeShare(name, a.at or b.at, count_a, count_b, share_a, share_b, change, interval, verdict)


def _judged(count_a: int, count_b: int, change: float, interval: Bounds, tolerance: float) -> Verdict:
    if not count_a or not count_b:
        return "undecided" if not count_a and not count_b else "better" if count_b else "worse"
    return judge(change, interval, tolerance, lower_is_better=False)


def newcombe(a: Estimate, b: Estimate) -> Bounds:
    """The interval of b − a, two independent shares with Wilson's intervals."""
    low_a, high_a, low_b, high_b = a.low or 0.0, _end(a), b.low or 0.0, _end(b)
    change = b.value - a.value
    return Bounds(
        change - sqrt((b.value - low_b) ** 2 + (high_a - a.value) ** 2),
        change + sqrt((high_b - b.value) ** 2 + (a.value - low_a) ** 2),
    )


def _end(one: Estimate) -> float:
    return 1.0 if one.high is None else one.high


def _bootstrap(names: Sequence[str], a: Load, b: Load, seed: int, draws: int) -> dict[str, Bounds]:
    """The interval of each change; empty where a side has no requests. What was not sent is drawn with nothing."""
    if not a.requests or not b.requests:
        return {}
    rng = np.random.default_rng(seed)
    sides = [_Ended.of(load, names) for load in (a, b)]
    changes = np.array([sides[1].drawn(rng) - sides[0].drawn(rng) for _ in range(draws)])  # (draws, names)
    return {name: bounds_of(changes[:, place]) for place, name in enumerate(names) if name != NOT_SENT}


@dataclass(frozen=True)
class _Ended:
    """The requests of a load in order of time: by repetition, and whether each ended in each way."""

    samples: list[Sample]
    ended: NDArray[np.float64]  # (requests, names), as a share of all that were to be sent

    @staticmethod
    def of(load: Load, names: Sequence[str]) -> "_Ended":
        requests = load.requests or {}
        ordered = sorted(requests)
        samples = [
            Sample.of([[0.0]] * sum(key[0] == repetition for key in ordered))
            for repetition in sorted({key[0] for key in ordered})
        ]
        ended = np.array(
            [[requests[key].outcome == name for name in names] for key in ordered], dtype=np.float64
        )
        return _Ended(samples, ended * len(ordered) / load.total)

    def drawn(self, rng: np.random.Generator) -> NDArray[np.float64]:
        weights = request_weights(self.samples, rng)
        return np.asarray(weights @ self.ended / max(1, int(weights.sum())))


def judge(change: float, interval: Bounds | None, tolerance: float, lower_is_better: bool) -> Verdict:
    """The verdict on one change: relative for a latency, in shares for an outcome."""
    if interval is None:
        return "undecided"
    if -tolerance <= interval.low and interval.high <= tolerance:
        return "same"
    higher = interval.low > 0 and change > tolerance
    lower = interval.high < 0 and change < -tolerance
    if not higher and not lower:
        return "undecided"
    return "better" if lower == lower_is_better else "worse"
