"""Percentiles and bootstrap against the obvious slow version, and against known sampling distributions."""

import numpy as np
import pytest

from lowbit_loadtest.report.statistics import (
    PERCENTILES,
    Sample,
    block_weights,
    bootstrap,
    bootstrap_mean,
    distribution,
    weighted_statistics,
)


@pytest.mark.parametrize("seed", range(20))
def test_weighted_percentiles_equal_numpys_of_the_sample_written_out(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.sort(rng.normal(size=30))
    weights = rng.integers(0, 4, 30)
    weights[0] += 1
    seen = weighted_statistics(values, weights)
    written_out = np.repeat(values, weights)
    assert seen["mean"] == pytest.approx(written_out.mean())
    for name, percent in PERCENTILES.items():
        assert seen[name] == pytest.approx(np.percentile(written_out, percent))


def test_block_weights_draw_as_many_requests_as_there_are() -> None:
    rng = np.random.default_rng(0)
    for requests in (0, 1, 2, 7, 100, 1001):
        assert block_weights(requests, rng).sum() == requests


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """95 % intervals of the mean and the median of 200 exponential values; 60 samples, so 95 ± 8 % is 3 sigma."""
    covered = {"mean": 0, "p50": 0}
    truth = {"mean": 1.0, "p50": np.log(2)}
    for seed in range(60):
        values = np.random.default_rng(seed).exponential(size=200)
        bounds = bootstrap([Sample.of(values[:, None].tolist())], seed)
        for name in covered:
            covered[name] += bounds[name].low <= truth[name] <= bounds[name].high
    for count in covered.values():
        assert 0.87 <= count / 60 <= 1


def test_repetitions_that_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    alike = [Sample.of(rng.normal(1, 0.1, (100, 1)).tolist()) for _ in range(3)]
    apart = [Sample.of(rng.normal(mean, 0.1, (100, 1)).tolist()) for mean in (0.8, 1.0, 1.2)]
    narrow, wide = bootstrap(alike)["mean"], bootstrap(apart)["mean"]
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_all_values_of_a_request_are_drawn_together() -> None:
    """Ten equal gaps in each of 100 requests say no more about the mean than one would."""
    rng = np.random.default_rng(1)
    values = rng.exponential(size=(100, 1))
    once, tenfold = (
        bootstrap([Sample.of(np.repeat(values, times, axis=1).tolist())], 5) for times in (1, 10)
    )
    assert tenfold["mean"].low == pytest.approx(once["mean"].low)
    assert tenfold["mean"].high == pytest.approx(once["mean"].high)


def test_one_request_has_no_interval() -> None:
    seen = distribution([Sample.of([[1.0]])])
    assert seen is not None
    assert seen.interval == {}
    assert bootstrap_mean([1.0]) is None


def test_the_same_seed_gives_the_same_interval() -> None:
    sample = Sample.of(np.random.default_rng(0).exponential(size=(50, 2)).tolist())
    assert distribution([sample], seed=4) == distribution([sample], seed=4)
