"""How far the served model is from its base on tokens that it served, of what two endpoints' top-k lists tell.

At each generated token the base gives the log-probabilities of its k likeliest tokens, p_i, and the served model those
of more of its own, q_i. The base's k that the served model names too are compared one by one, all others are one
bucket, with the masses P and Q:

    KL ≈ Σ p_i (log p_i − log q_i) + P log(P / Q) + P v / 2

in nats, base against served, as `quality.mean_kld` of a manifest. The first two terms are the divergence after merging,
which never raises it (Kullback and Leibler, On Information and Sufficiency, 1951): a lower bound. The third stands for
the divergence within the bucket, which to second order is half the variance of log p/q there (Kullback, Information
Theory and Statistics, 1959, chapter 2). That variance cannot be seen; v is the variance, weighted by p, over the less
likely half of the k: rounding moves logits by about as much at rank 30 as at rank 15. What top-k lists leave out, and
why it matters: Anshumann et al., Sparse Logit Sampling, 2025, arXiv 2503.16870. `benchmarks/shadow` measures what is
left of it against the divergence over the whole vocabulary.
"""

import heapq
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TOP = 20  # of the base: what vLLM gives unless its --max-logprobs says otherwise
SERVED_TOP = 100  # of the served model, so that nearly all of the base's are among them
LEAST = 1e-9  # of a bucket: log-probabilities are rounded, and what is left of 1 may come out as nothing

LogProbs = Mapping[int, float]  # by token id, at one position


@dataclass(frozen=True)
class Position:
    """Of one generated token: nats, and the base's probability outside the tokens that were compared one by one."""

    kld: float
    remainder: float


def compare(base: LogProbs, served: LogProbs) -> Position:
    """The divergence at one position; ValueError where the served model names none of the base's tokens."""
    ranked = [token for token in heapq.nlargest(TOP, base, key=base.__getitem__) if token in served]
    if not ranked:
        raise ValueError("the served model names none of the base's likeliest tokens")
    p = [math.exp(base[token]) for token in ranked]
    ratios = [base[token] - served[token] for token in ranked]
    p_rest = max(LEAST, 1.0 - math.fsum(p))
    q_rest = max(LEAST, 1.0 - math.fsum(math.exp(served[token]) for token in ranked))
    bound = math.fsum(map(operator.mul, p, ratios)) + p_rest * math.log(p_rest / q_rest)
    half = len(ranked) // 2
    return Position(max(0.0, bound) + p_rest * _variance(ratios[half:], p[half:]) / 2, p_rest)


def _variance(values: Sequence[float], weights: Sequence[float]) -> float:
    total = math.fsum(weights)
    if total <= 0:
        return 0.0
    mean = math.fsum(map(operator.mul, values, weights)) / total
    return (
        math.fsum(weight * (value - mean) ** 2 for value, weight in zip(values, weights, strict=True)) / total
    )


@dataclass
class Divergence:
    """Sums over scored answers, for means and their errors."""

    answers: int = 0
    tokens: int = 0
    nats: float = 0.0
    remainder: float = 0.0
    _squares: float = 0.0  # of an answer's nats
    _products: float = 0.0  # of its nats and its tokens
    _lengths: float = 0.0  # squares of its tokens

    def add(self, positions: Sequence[Position]) -> None:
        """One more answer."""
        nats, tokens = math.fsum(one.kld for one in positions), len(positions)
        self.answers += 1
        self.tokens += tokens
        self.nats += nats
        self.remainder += math.fsum(one.remainder for one in positions)
        self._squares += nats * nats
        self._products += nats * tokens
        self._lengths += tokens * tokens

    @property
    def mean(self) -> float | None:
        """Nats per token; None before the first answer."""
        return self.nats / self.tokens if self.tokens else None

    @property
    def stderr(self) -> float | None:
        """Standard error of the mean over answers, which are independent as their tokens are not; None below two.

        That of a ratio of sums (Cochran, Sampling Techniques, 1977, chapter 6).
        """
        mean = self.mean
        if mean is None or self.answers < 2:
            return None
        apart = self._squares - 2 * mean * self._products + mean * mean * self._lengths
        return math.sqrt(max(0.0, apart) * self.answers / (self.answers - 1)) / self.tokens

    @property
    def mean_remainder(self) -> float | None:
        """The base's probability outside the compared tokens, mean over tokens."""
        return self.remainder / self.tokens if self.tokens else None
