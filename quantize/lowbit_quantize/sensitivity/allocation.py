"""One choice for each decision, so that the sum of losses is least under limits on sums of costs: an integer program.

A multiple-choice knapsack, solved exactly by HiGHS's branch and cut (Huangfu and Hall 2018). It knows nothing of
models: decisions are rows, choices columns, and rows may differ in length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowbit_core.errors import ConfigError

Table = Sequence[Sequence[float]]  # a row for each decision, a number for each of its choices
GAP = 1e-6  # of the optimum, where the search ends


@dataclass(frozen=True)
class Limit:
    """What each choice costs, and the most that all may cost together; `name` is what a refusal calls it."""

    name: str
    costs: Table
    most: float

    @property
    def least(self) -> float:
        """What the cheapest choices cost."""
        return sum(min(row) for row in self.costs)


def allocate(losses: Table, limits: Sequence[Limit]) -> list[int]:
    """The choice of each decision that together lose least within all limits.

    Raises ConfigError where none is within them, with the least that can be had.
    """
    for limit in limits:
        if limit.least > limit.most * (1 + 1e-9):
            raise ConfigError(
                f"{limit.name}: {limit.most:.6g} is asked for and {limit.least:.6g} is the least that these "
                "candidates can have; allow more, or give smaller candidates"
            )
    counts = [len(row) for row in losses]
    picked = _solve(counts, _flat(losses), [(_flat(limit.costs), limit.most) for limit in limits])
    if picked is None:
        names = " and ".join(limit.name for limit in limits)
        raise ConfigError(f"no choice of schemes is within {names} together; allow more of one of them")
    return picked


def _flat(table: Table) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    return np.concatenate([np.asarray(row, dtype=np.float64) for row in table])


def _solve(
    counts: Sequence[int],
    losses: "np.ndarray[tuple[int], np.dtype[np.float64]]",
    limits: Sequence[tuple["np.ndarray[tuple[int], np.dtype[np.float64]]", float]],
) -> list[int] | None:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    owners = np.repeat(np.arange(len(counts)), counts)
    one_each = csr_array((np.ones(len(owners)), (owners, np.arange(len(owners)))))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for costs, most in limits:
        scale = max(float(costs.max()), 1e-30)
        constraints.append(LinearConstraint(costs / scale, -np.inf, most / scale))
    found = milp(
        losses / max(float(losses.max()), 1e-30), constraints=constraints, integrality=np.ones(len(losses)),
        bounds=Bounds(0, 1), options={"mip_rel_gap": GAP},
    )  # fmt: skip
    if found.x is None:
        return None
    starts = np.cumsum([0, *counts[:-1]])
    return [int(found.x[first : first + count].argmax()) for first, count in zip(starts, counts, strict=True)]
