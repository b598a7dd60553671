"""The highest rate that still meets the SLOs: bisection on a logarithmic scale, one rate after the other."""

import math
from collections.abc import Sequence

from lowbit_loadtest.scenario import Search

Seen = Sequence[tuple[float, bool]]  # each rate that was measured, and whether it met the SLOs


def bracket(seen: Seen) -> tuple[float | None, float | None]:
    """The highest rate that met them below every one that did not, and the lowest that did not."""
    fails = min((rate for rate, met in seen if not met), default=None)
    meets = max((rate for rate, met in seen if met and (fails is None or rate < fails)), default=None)
    return meets, fails


def next_search_rate(search: Search, seen: Seen) -> float | None:
    """The next rate to measure; None when the bracket is narrow enough, or an end of the range decides."""
    if not seen:
        return search.low_rps
    meets, fails = bracket(seen)
    if meets is None:
        return None  # not even the lowest
    if fails is None:
        return search.high_rps if meets < search.high_rps else None
    return None if fails / meets - 1 <= search.resolution else math.sqrt(meets * fails)
