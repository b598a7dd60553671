"""Statistics of right and wrong, of paired changes, and of log-probabilities; standard library only.

Intervals are 95 %. Wilson (1927) for shares, because it keeps inside 0..1 and does not collapse at 0 or 1; Bonett and
Price (2012) for paired differences, for the same reasons: no change seen in n items is not certainty; McNemar's exact
test (1947) for whether two sets of right answers differ.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Z = 1.959964
SMALLEST = 1e-12
Token = TypeVar("Token", bound=Hashable)


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its interval, None where one unit was measured and nothing is known of its spread."""

    value: float
    low: float | None
    high: float | None


def wilson(right: int, n: int) -> Estimate:
    """A share of n; (0, 1) without any."""
    if n == 0:
        return Estimate(0.0, 0.0, 1.0)
    share = right / n
    middle = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half))


def paired_change(lost: int, gained: int, n: int) -> Estimate:
    """(gained − lost) / n, of n items that were each judged twice (Bonett and Price 2012)."""
    if n == 0:
        return Estimate(0.0, -1.0, 1.0)
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return Estimate((gained - lost) / n, max(-1.0, up - down - half), min(1.0, up - down + half))


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p that `lost` and `gained` come from a fair coin; 1 without changes."""
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1))
    return min(1.0, tail / float(2 ** (n - 1))) if n else 1.0


def exponential(one: Estimate) -> Estimate:
    """exp of a number and its interval."""
    low, high = (None if end is None else math.exp(end) for end in (one.low, one.high))
    return Estimate(math.exp(one.value), low, high)


def mean_with_interval(values: Sequence[float], weights: Sequence[float] | None = None) -> Estimate:
    """The mean of sum(values)/sum(weights) over independent units (texts), by the ratio's linearisation."""
    counts = weights or [1.0] * len(values)
    total = sum(counts)
    if not values or total == 0:
        return Estimate(0.0, None, None)
    mean = sum(values) / total
    n = len(values)
    if n < 2:
        return Estimate(mean, None, None)
    squares = sum((value - mean * count) ** 2 for value, count in zip(values, counts, strict=True))
    half = Z * math.sqrt(squares * n / (n - 1)) / total
    return Estimate(mean, mean - half, mean + half)


def kl_lower_bound(p: Mapping[Token, float], q: Mapping[Token, float]) -> float:
    """A lower bound of KL(p‖q) in nats from the top log-probabilities of both.

    Tokens that stand in both lists are compared one by one, everything else as one heap: merging outcomes never raises
    a KL divergence (data processing inequality). It is exact where the lists hold all the mass.
    """
    both = [token for token in p if token in q]
    mass_p = [math.exp(p[token]) for token in both]
    mass_q = [math.exp(q[token]) for token in both]
    bound = sum(math.exp(p[token]) * (p[token] - q[token]) for token in both)
    rest_p, rest_q = max(0.0, 1 - sum(mass_p)), max(SMALLEST, 1 - sum(mass_q))
    if rest_p > SMALLEST:
        bound += rest_p * math.log(rest_p / rest_q)
    return max(0.0, bound)


def span(one: Estimate, form: str = "{:.4g}") -> str:
    """`1.2 [1.1–1.3]`, in any format of a number."""
    value = form.format(one.value)
    if one.low is None or one.high is None:
        return value
    return f"{value} [{form.format(one.low)}–{form.format(one.high)}]"
