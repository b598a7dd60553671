"""Confidence sequences: intervals that hold at every look at once, so that one may look as often as one likes.

A fixed-n interval that is looked at after every round errs far more often than it says. These hold for all n together
(Ville 1939): P(there is an n at which the truth is outside) <= alpha, whatever made anybody stop.

Bounded differences (accuracy, item by item) take the hedged capital of Waudby-Smith and Ramdas (2024, "Estimating means
of bounded random variables by betting", JRSS B 86(1), arXiv 2010.09686): a gambler who bets that the mean is above m
gains K(m) = prod(1 + lambda_i (x_i - m)); values of m against which the capital reaches 2/alpha are refused. The bets
are a mixture over gaps that might be there, each by the rule lambda = gap / (variance + gap^2), with the variance of
the items before. This is exact for any distribution on the range, and takes little of items that seldom differ.

Unbounded ones (log ratios of speeds, KL and log perplexity by text) take the t-test's: the Bayes factor of a normal
effect size against none, with the right Haar prior on the spread (Wang and Ramdas 2024, "Anytime-valid t-tests and
confidence sequences for Gaussian means with unknown variance", arXiv 2310.03722; Lai 1976). It is exact for normal
values at every n from 2, and for others it has the leading term of the asymptotic confidence sequences of Waudby-Smith,
Arbour, Sinha, Kennedy and Ramdas (2024, Annals of Statistics 52(6), arXiv 2103.06476): KL is heavy-tailed and has no
bound, so that its intervals are asymptotic, and nothing is decided by fewer than a score of texts.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

GAPS = (0.0025, 0.005, 0.01, 0.02, 0.08)  # of the range's half: what the mixture bets on
STAKES = (0.1, 0.15, 0.3, 0.3, 0.15)  # the part of the capital on each: most where a point or two is told
FIRST_VARIANCE = 0.05  # of the half range squared: what is thought of the spread before the first item
LARGEST_BET = 0.9  # of what would risk ruin
MOST_UNITS = 1_000_000
BISECTIONS = 18  # of the range: an end to within one part in 260,000


@dataclass(frozen=True)
class Confidence:
    """A mean with the ends of its confidence sequence after n units; infinite where n is too small to say.

    `spread` is the standard deviation of a unit; `reach` says how far the interval will reach to a side after n units.
    """

    value: float
    low: float
    high: float
    n: int
    spread: float
    reach: Callable[[int], float] = field(default=lambda n: math.inf, compare=False)

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2

    @property
    def mirrored(self) -> "Confidence":
        """Of the difference the other way round."""
        return replace(self, value=-self.value, low=-self.high, high=-self.low)

    def units_until(self, half: float) -> int | None:
        """After how many units the interval reaches no further than `half`, if the spread stays; None: a million."""
        if not math.isfinite(self.spread) or self.reach(MOST_UNITS) > half:
            return None
        return bisect_left(range(MOST_UNITS), True, lo=2, key=lambda n: self.reach(n) <= half)

    def within(self, margin: float) -> bool:
        """Whether the whole interval is nearer to 0 than `margin`."""
        return -margin < self.low and self.high < margin


UNKNOWN = Confidence(0.0, -math.inf, math.inf, 0, math.inf)


def bounded_mean(values: Sequence[float] | Floats, low: float, high: float, alpha: float) -> Confidence:
    """The mean of values that cannot leave low..high, by betting; values stand in the order of asking."""
    if len(values) == 0:
        return UNKNOWN
    half, middle = (high - low) / 2, (high + low) / 2
    scaled = (np.asarray(values, dtype=np.float64) - middle) / half  # -1..1
    start = min(1.0, max(-1.0, -middle / half))  # no difference, before the first item
    bets = _bets(scaled, start)
    below = _refused_below(scaled, bets, alpha)
    above = -_refused_below(-scaled, bets, alpha)
    mean, spread = float(scaled.mean()), float(scaled.std())
    ends = (min(mean, below), max(mean, above))
    return Confidence(
        middle + half * mean,
        middle + half * ends[0],
        middle + half * ends[1],
        len(values),
        half * spread,
        lambda n: half * _betting_reach(n, spread, alpha),
    )


def _bets(scaled: Floats, start: float) -> Floats:
    """Each gap's bet on each item, from the items before it only.  # (gaps, items)"""
    counts = np.arange(1, scaled.size + 1)
    means = (start + np.cumsum(scaled)) / (counts + 1)
    squares = np.cumsum((scaled - means) ** 2)
    before = np.concatenate([[0.0], squares[:-1]])
    variance = (FIRST_VARIANCE + before) / counts
    gaps = np.array(GAPS)[:, None]
    return np.asarray(gaps / (variance[None, :] + gaps**2), dtype=np.float64)


def _refused_below(scaled: Floats, bets: Floats, alpha: float) -> float:
    """The largest m in -1..1 below which every mean is refused: capital falls as m rises, so that halving finds it."""
    needed = math.log(2 / alpha)
    low, high = -1.0, float(scaled.mean())
    for _ in range(BISECTIONS):
        m = (low + high) / 2
        if _log_capital(scaled, bets, m) >= needed:
            low = m
        else:
            high = m
    return low


def _betting_reach(n: int, spread: float, alpha: float) -> float:
    """About how far from the mean the interval of n items reaches: where the mixture's best bet has grown enough.

    A bet b on a gap h grows by about b h - b^2 (spread^2 + h^2) / 2 an item; values are on -1..1.
    """
    variance = spread**2 + FIRST_VARIANCE / n
    reach = [1.0]
    for gap, stake in zip(GAPS, STAKES, strict=True):
        needed = math.log(2 / (alpha * stake)) / n
        bet = min(LARGEST_BET, gap / (variance + gap**2))
        discriminant = bet**2 - 2 * bet**2 * (needed + bet**2 * variance / 2)
        if discriminant >= 0:
            reach.append((bet - math.sqrt(discriminant)) / bet**2)
    return min(reach)


def _log_capital(scaled: Floats, bets: Floats, m: float) -> float:
    """Of the mixture that bets on a mean above m; bets are cut where losing one would cost more than LARGEST_BET."""
    cut = np.minimum(bets, LARGEST_BET / (1 + m)) if m > -1 else bets
    logs = np.log1p(cut * (scaled - m)).sum(axis=1)
    most = float(logs.max())
    return most + math.log(float(np.dot(STAKES, np.exp(logs - most))))


def normal_mean(values: Sequence[float] | Floats, alpha: float, planned: int) -> Confidence:
    """The mean of about normal values of unknown spread; the interval is narrowest near `planned` of them."""
    array = np.asarray(values, dtype=np.float64)
    n = array.size
    if n < 2:
        return UNKNOWN if n == 0 else Confidence(float(array[0]), -math.inf, math.inf, 1, math.inf)
    mean = float(array.mean())
    spread = float(array.std(ddof=1))

    def reach(count: int) -> float:
        return spread * math.sqrt((count - 1) / count) * _student_reach(count, alpha, planned)

    half = reach(n)
    return Confidence(mean, mean - half, mean + half, n, spread, reach)


def ratio_of_sums(sums: Sequence[float], weights: Sequence[float], alpha: float, planned: int) -> Confidence:
    """sum(sums) / sum(weights) over independent units, such as texts and their tokens, by linearizing the ratio."""
    if not sums or sum(weights) <= 0:
        return UNKNOWN
    counts = np.asarray(weights, dtype=np.float64)
    ratio = float(np.sum(sums)) / float(counts.sum())
    return normal_mean(
        ratio + (np.asarray(sums, dtype=np.float64) - ratio * counts) / float(counts.mean()), alpha, planned
    )


def _student_reach(n: int, alpha: float, planned: int) -> float:
    """Half the interval in units of sqrt(sum of squares / n): where the Bayes factor of the t-test reaches 1 / alpha.

    Factor: (1 + n g)^(-1/2) ((1 + T) / (1 + T / (1 + n g)))^(n/2), T = n (mean - m)^2 / sum of squares, with g the
    prior variance of the effect size: as rho^2 of Waudby-Smith et al. (2024), it makes the interval narrowest near
    `planned`.
    """
    wanted = -2 * math.log(alpha)
    grown = 1 + n * (wanted + math.log(wanted + 1)) / planned
    log_needed = (math.log(grown) / 2 - math.log(alpha)) * 2 / n
    if log_needed >= math.log(grown):
        return math.inf
    needed = math.exp(log_needed)
    return math.sqrt((needed - 1) / (1 - needed / grown))
