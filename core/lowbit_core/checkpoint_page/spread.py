"""Several values as one mark: their mean, and from the smallest to the largest. What is not finite has no place."""

import math
from collections.abc import Iterable, Mapping

from lowbit_core.evals.arithmetic import Estimate
from lowbit_core.pages.chart import Mark


def finite(values: Iterable[float | None]) -> list[float]:
    """Those that can be drawn."""
    return [value for value in values if value is not None and math.isfinite(value)]


def spread(values: Iterable[float]) -> Estimate | None:
    """The mean between its ends, which one value has not; None of no value."""
    known = finite(values)
    if not known:
        return None
    mean, low, high = math.fsum(known) / len(known), min(known), max(known)
    return Estimate(mean, low, high) if low < high else Estimate(mean, None, None)


def marks(by_layer: Mapping[int, Iterable[float]]) -> list[Mark]:
    """A mark for each layer that has values, in order."""
    found = ((layer, spread(values)) for layer, values in sorted(by_layer.items()))
    return [Mark(layer, one.value, one.low, one.high) for layer, one in found if one]


def number(value: float | None, digits: str = ".3g") -> str:
    """A cell of a table."""
    return "–" if value is None else f"{value:{digits}}"
