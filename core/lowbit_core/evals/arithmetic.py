"""Statistics of accuracy, of paired changes and of log-probabilities.

Intervals are 95 %. A share has Wilson's (1927): it stays within 0..1 and has a width at 0 and at 1 too. A paired
difference has Bonett and Price's (2012) for the same reasons: no change in n items does not prove that there is none.
McNemar's exact test (1947) says whether two models differ in accuracy. scipy is imported when it is first used, because
that takes a second.
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
    """A number and the ends of its interval; None where only one unit was measured and its spread is unknown."""

    value: float
    low: float | None
    high: float | None


def wilson(right: int, n: int) -> Estimate:
    """The share right / n; 0..1 where n is 0."""
    if n == 0:
        return Estimate(0.0, 0.0, 1.0)
    from scipy.stats import binomtest

    interval = binomtest(right, n).proportion_ci(method="wilson")
    return Estimate(right / n, float(interval.low), float(interval.high))


def paired_change(lost: int, gained: int, n: int) -> Estimate:
    """(gained − lost) / n, of n items that both models answered (Bonett and Price 2012)."""
    if n == 0:
        return Estimate(0.0, -1.0, 1.0)
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return Estimate((gained - lost) / n, max(-1.0, up - down - half), min(1.0, up - down + half))


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p of McNemar's test; 1 without changes."""
    if lost + gained == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + gained, 0.5).pvalue)


def exponential(one: Estimate) -> Estimate:
    """exp of a number and its interval."""
    low, high = (None if end is None else math.exp(end) for end in (one.low, one.high))
    return Estimate(math.exp(one.value), low, high)


def mean_with_interval(values: Sequence[float], weights: Sequence[float] | None = None) -> Estimate:
    """sum(values) / sum(weights) over independent units, such as texts; the interval by linearizing the ratio."""
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

    Tokens that are in both lists are compared one by one, all others as one outcome: merging outcomes never raises a KL
    divergence (data processing inequality). It is exact where the lists hold all the mass.
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
