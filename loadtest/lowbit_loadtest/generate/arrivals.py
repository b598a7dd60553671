"""Send times: fixed by the seed before the run, in seconds from its start. Pure arithmetic.

Each purpose draws from its own stream of random numbers, so that changing the prompts leaves the arrivals alone.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from lowbit_loadtest.sections.arrivals import Constant, Gamma, Poisson
from lowbit_loadtest.sections.distributions import Distribution, Lengths, Seconds

OpenArrivals = Poisson | Gamma | Constant


class Draw(IntEnum):
    """What random numbers are drawn for."""

    ARRIVALS = 0
    PROMPT_LENGTHS = 1
    OUTPUT_LENGTHS = 2
    TURNS = 3
    WORDS = 4
    PAUSES = 5
    TOOL_RESULTS = 6


def generator(draw: Draw, *seeds: int) -> np.random.Generator:
    """The random numbers of one purpose, from the scenario's seed and whatever else tells runs apart."""
    return np.random.default_rng([int(draw), *seeds])


def send_times_s(
    arrivals: OpenArrivals, rng: np.random.Generator, requests: int | None, duration_s: float | None
) -> NDArray[np.float64]:
    """`requests` times, or all below `duration_s`; the first gap starts at 0 (constant: the first request)."""
    if requests is not None:
        return _times_s(arrivals, rng, requests)
    if duration_s is None:
        raise ValueError("neither requests nor duration_s")
    times_s = np.empty(0)
    while times_s.size == 0 or times_s[-1] < duration_s:
        more = max(16, int(1.2 * arrivals.rate_rps * duration_s))
        start_s = times_s[-1] if times_s.size else 0.0
        times_s = np.concatenate([times_s, start_s + _times_s(arrivals, rng, more)])
        if isinstance(arrivals, Constant):
            times_s = np.arange(times_s.size) / arrivals.rate_rps
    return times_s[times_s < duration_s]


def _times_s(arrivals: OpenArrivals, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    mean_gap_s = 1 / arrivals.rate_rps
    match arrivals:
        case Poisson():
            return np.cumsum(rng.exponential(mean_gap_s, count))
        case Gamma(burstiness=shape):
            return np.cumsum(rng.gamma(shape, mean_gap_s / shape, count))
        case Constant():
            return np.arange(count, dtype=np.float64) * mean_gap_s


def draw_lengths(lengths: Lengths, rng: np.random.Generator, count: int) -> list[int]:
    """`count` whole lengths between `min` and `max`."""
    if lengths.kind == "uniform":
        return [int(value) for value in rng.integers(lengths.min, lengths.max, count, endpoint=True)]
    return [int(value) for value in np.clip(np.rint(_draw(lengths, rng, count)), lengths.min, lengths.max)]


def draw_seconds(seconds: Seconds, rng: np.random.Generator, count: int) -> list[float]:
    """`count` times between `min` and `max`."""
    return [float(value) for value in np.clip(_draw(seconds, rng, count), seconds.min, seconds.max)]


def _draw(given: Distribution, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    mean, sd = given.mean or 0.0, given.sd or 0.0
    match given.kind:
        case "fixed":
            return np.full(count, mean)
        case "uniform":
            return rng.uniform(*given.bounds, count)
        case "normal":
            return rng.normal(mean, sd, count)
        case "lognormal":
            variance = np.log1p((sd / mean) ** 2)  # of the logarithm
            return rng.lognormal(np.log(mean) - variance / 2, np.sqrt(variance), count)
