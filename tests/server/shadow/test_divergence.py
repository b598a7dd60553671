"""The estimate from top-k lists against the divergence over a whole vocabulary, and its error against resampling."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit_server.shadow.divergence import SERVED_TOP, TOP, Divergence, Position, compare

VOCABULARY, POSITIONS = 4000, 400


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def top(row: np.ndarray, count: int) -> dict[int, float]:
    return {int(token): float(row[token]) for token in np.argsort(row)[-count:]}


def models(steepness: float, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of a base and of one whose logits are off by noise, (positions, vocabulary)."""
    generator = np.random.default_rng(seed)
    base = generator.gumbel(size=(POSITIONS, VOCABULARY)) * steepness
    return log_softmax(base), log_softmax(base + generator.normal(size=base.shape) * noise)


@pytest.mark.parametrize("steepness", [0.9, 1.3, 2.0])
@pytest.mark.parametrize("noise", [0.05, 0.3, 0.6])
def test_the_estimate_is_near_the_whole_vocabularys_divergence(steepness: float, noise: float) -> None:
    p, q = models(steepness, noise)
    whole = float((np.exp(p) * (p - q)).sum(-1).mean())
    found = [compare(top(base, TOP), top(served, SERVED_TOP)) for base, served in zip(p, q, strict=True)]
    assert np.mean([one.kld for one in found]) == pytest.approx(whole, rel=0.15)
    best = np.sort(np.exp(p))[:, -TOP:].sum(-1)
    assert np.mean([one.remainder for one in found]) == pytest.approx(1 - best.mean(), rel=0.05)


def test_a_model_is_no_way_from_itself() -> None:
    p, _ = models(1.3, 0.0)
    assert compare(top(p[0], TOP), top(p[0], SERVED_TOP)).kld == pytest.approx(0, abs=1e-6)


def test_with_every_token_listed_it_is_the_divergence_itself() -> None:
    base = {0: math.log(0.7), 1: math.log(0.2), 2: math.log(0.1)}
    served = {0: math.log(0.5), 1: math.log(0.3), 2: math.log(0.2)}
    whole = sum(math.exp(base[i]) * (base[i] - served[i]) for i in base)
    assert compare(base, served).kld == pytest.approx(whole, abs=1e-7)


def test_tokens_that_the_served_model_does_not_name_are_in_the_bucket() -> None:
    base = {0: math.log(0.6), 1: math.log(0.3)}
    found = compare(base, {0: math.log(0.9), 7: math.log(0.05)})
    assert found.remainder == pytest.approx(0.4)
    assert found.kld == pytest.approx(0.6 * math.log(0.6 / 0.9) + 0.4 * math.log(0.4 / 0.1))
    with pytest.raises(ValueError, match="names none"):
        compare(base, {7: -0.1})


LOGPROBS = st.dictionaries(st.integers(0, 30), st.floats(-60, 0), min_size=1, max_size=21)


@given(base=LOGPROBS, served=LOGPROBS)
def test_whatever_is_given_the_result_is_a_finite_number_of_at_least_zero(
    base: dict[int, float], served: dict[int, float]
) -> None:
    """Rounded log-probabilities may add up to more than 1, and an endpoint may send anything."""
    if not base.keys() & served.keys():
        return
    found = compare(base, served)
    assert math.isfinite(found.kld)
    assert found.kld >= 0
    assert 0 < found.remainder <= 1


def test_the_error_is_that_of_resampled_answers() -> None:
    generator = np.random.default_rng(1)
    answers = []
    for _ in range(200):
        level, length = generator.gamma(2.0, 0.1), int(generator.integers(1, 60))
        answers.append([Position(float(level * generator.uniform(0.5, 1.5)), 0.1) for _ in range(length)])
    found = Divergence()
    assert (found.mean, found.stderr, found.mean_remainder) == (None, None, None)
    for one in answers:
        found.add(one)
    nats, tokens = (np.array([f(one) for one in answers]) for f in (lambda a: sum(p.kld for p in a), len))
    draws = generator.integers(0, len(answers), (4000, len(answers)))
    means = nats[draws].sum(1) / tokens[draws].sum(1)
    assert found.mean == pytest.approx(nats.sum() / tokens.sum())
    assert found.stderr == pytest.approx(means.std(), rel=0.05)
    assert found.mean_remainder == pytest.approx(0.1)
    assert (found.answers, found.tokens) == (200, tokens.sum())
