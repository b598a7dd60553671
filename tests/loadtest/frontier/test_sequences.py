"""Confidence sequences: they hold at every look together, and equal their obvious slow versions."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_loadtest.frontier.decide.sequences import (
    FIRST_VARIANCE,
    GAPS,
    LARGEST_BET,
    STAKES,
    UNKNOWN,
    bounded_mean,
    normal_mean,
    ratio_of_sums,
)

ALPHA = 0.05


def share_of_misses(draws: int, of_one: "Misses") -> float:
    rng = np.random.default_rng(17)
    return sum(of_one(rng) for _ in range(draws)) / draws


class Misses:
    """Whether the truth is ever outside, of one drawn sequence that is looked at many times."""

    def __init__(self, truth: float, looks: Sequence[int]) -> None:
        self.truth, self.looks = truth, looks

    def __call__(self, rng: np.random.Generator) -> bool:
        raise NotImplementedError


class OfFlips(Misses):
    def __call__(self, rng: np.random.Generator) -> bool:
        values = rng.choice([-1.0, 0.0, 1.0], self.looks[-1], p=[0.06, 0.89, 0.05])
        found = [bounded_mean(values[:n], -1, 1, ALPHA) for n in self.looks]
        return any(not one.low <= self.truth <= one.high for one in found)


class OfSpeeds(Misses):
    def __call__(self, rng: np.random.Generator) -> bool:
        values = rng.normal(self.truth, 0.03, self.looks[-1])
        found = [normal_mean(values[:n], ALPHA, 40) for n in self.looks]
        return any(not one.low <= self.truth <= one.high for one in found)


def test_a_look_after_every_round_misses_a_gap_of_accuracy_in_at_most_5_percent() -> None:
    assert share_of_misses(40, OfFlips(-0.01, range(60, 361, 60))) <= 0.05


def test_a_look_after_every_round_misses_a_gap_of_speed_in_at_most_5_percent() -> None:
    assert share_of_misses(100, OfSpeeds(0.02, range(2, 61, 2))) <= 0.05


def test_an_ordinary_interval_looked_at_as_often_would_err_far_more() -> None:
    rng, missed = np.random.default_rng(3), 0
    for _ in range(200):
        values = rng.normal(0, 1, 60)
        missed += any(abs(values[:n].mean()) > 1.96 * values[:n].std(ddof=1) / n**0.5 for n in range(2, 61))
    assert missed / 200 > 0.25


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.sampled_from([-1.0, -0.93, -0.2, 0.0, 0.07, 0.5, 1.0]), min_size=1, max_size=40),
    st.sampled_from([0.05, 0.002]),
)
def test_betting_refuses_exactly_what_the_slow_capital_refuses(values: list[float], alpha: float) -> None:
    found = bounded_mean(values, -1, 1, alpha)
    for m in (found.low - 1e-3, found.high + 1e-3):
        if -1 < m < 1 and m != found.value:
            assert slow_capital(values, m) >= 2 / alpha * 0.98
    for m in (found.low + 1e-3, found.high - 1e-3):
        if found.low < m < found.high:
            assert slow_capital(values, m) < 2 / alpha


def slow_capital(values: Sequence[float], m: float) -> float:
    """The larger of both gamblers' capitals, item by item, as the module's docstring says it."""
    return max(one_side(values, m), one_side([-value for value in values], -m))


def one_side(values: Sequence[float], m: float) -> float:
    total = 0.0
    for gap, stake in zip(GAPS, STAKES, strict=True):
        capital, running, squares = 1.0, 0.0, 0.0
        for n, value in enumerate(values, 1):
            variance = (FIRST_VARIANCE + squares) / n
            capital *= 1 + min(gap / (variance + gap**2), LARGEST_BET / (1 + m)) * (value - m)
            running += value
            squares += (value - running / (n + 1)) ** 2
        total += stake * capital
    return total


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.97, 1.0), (0.0, 1.0)])
def test_the_interval_of_any_range_holds_the_mean_and_narrows(low: float, high: float) -> None:
    rng = np.random.default_rng(1)
    values = np.clip(rng.normal(0.2, 0.1, 2000), low, high)
    widths = [bounded_mean(values[:n], low, high, ALPHA).half for n in (20, 200, 2000)]
    assert all(after < before for before, after in pairwise(widths))
    found = bounded_mean(values, low, high, ALPHA)
    assert low <= found.low <= found.value <= found.high <= high
    assert found.low < 0.2 < found.high


def test_items_that_seldom_differ_take_few_items() -> None:
    rng = np.random.default_rng(2)
    small = bounded_mean(rng.normal(0, 0.03, 1500), -1, 1, 0.002)
    large = bounded_mean(rng.choice([-1.0, 1.0], 1500), -1, 1, 0.002)
    assert small.within(0.01)
    assert not large.within(0.05)


def test_the_t_test_refuses_exactly_what_its_bayes_factor_refuses() -> None:
    values = np.random.default_rng(5).normal(0.3, 1.0, 12)
    alpha, planned = 0.05, 40
    found = normal_mean(values, alpha, planned)
    wanted = -2 * math.log(alpha)
    variance = (wanted + math.log(wanted + 1)) / planned
    assert bayes_factor(values, found.high, variance) == pytest.approx(1 / alpha, rel=0.02)
    assert bayes_factor(values, found.low, variance) == pytest.approx(1 / alpha, rel=0.02)


def bayes_factor(values: np.ndarray, m: float, variance: float) -> float:
    """Both marginal likelihoods by sums over a grid: right Haar prior on the spread, normal on the effect size."""
    logs = np.linspace(-3, 4, 1500)
    spreads = np.exp(logs)[:, None]
    effects = np.linspace(-6, 6, 801) * math.sqrt(variance)
    prior = np.exp(-(effects**2) / 2 / variance) / math.sqrt(2 * math.pi * variance)

    def likelihood(effect: np.ndarray) -> np.ndarray:
        squares = sum((value - m - effect * spreads) ** 2 for value in values)
        return np.asarray(spreads ** -len(values) * np.exp(-squares / 2 / spreads**2))

    with_effect = np.trapezoid(np.trapezoid(likelihood(effects) * prior, effects, axis=1), logs)
    without = np.trapezoid(likelihood(np.zeros(1))[:, 0], logs)
    return float(with_effect / without)


def test_too_few_say_nothing() -> None:
    assert bounded_mean([], -1, 1, ALPHA) == UNKNOWN
    assert normal_mean([], ALPHA, 40) == UNKNOWN
    assert normal_mean([0.3], ALPHA, 40).high == math.inf
    assert ratio_of_sums([], [], ALPHA, 40) == UNKNOWN


def test_the_ratio_of_sums_is_that_of_all_tokens() -> None:
    rng = np.random.default_rng(4)
    weights = rng.integers(50, 200, 80).astype(float)
    sums = weights * rng.normal(0.1, 0.02, 80)
    found = ratio_of_sums(list(sums), list(weights), ALPHA, 100)
    assert found.value == pytest.approx(sums.sum() / weights.sum())
    assert found.low < 0.1 < found.high


@pytest.mark.parametrize("spread", [0.03, 0.1, 0.3])
def test_what_it_would_take_is_about_what_it_takes(spread: float) -> None:
    """Extrapolated from 500 items, the interval after 3000 is within a third of what it becomes."""
    values = np.clip(np.random.default_rng(6).normal(0, spread, 3000), -1, 1)
    early, late = (bounded_mean(values[:n], -1, 1, 0.002) for n in (500, 3000))
    assert early.reach(3000) == pytest.approx(late.half, rel=0.34)
    needed = early.units_until(late.half)
    assert needed is not None
    assert 1500 < needed < 6000


def test_more_rounds_are_counted_exactly_for_a_spread_that_stays() -> None:
    found = normal_mean(np.random.default_rng(7).normal(0, 0.04, 30), 0.002, 40)
    assert found.reach(30) == pytest.approx(found.half)
    needed = found.units_until(0.02)
    assert needed is not None
    assert found.reach(needed) <= 0.02 < found.reach(needed - 1)
    assert found.units_until(1e-9) is None
    assert UNKNOWN.units_until(0.1) is None
