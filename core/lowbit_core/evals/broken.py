"""Where a part broke though the mean did not: a task, or a domain of text, that lost far more than all of them.

A part is named when its loss is beyond its own error, and so far above the mean of all parts that this is no chance
either: even the low end of its 95 % interval lies above the mean, and the loss is at least `TIMES` the mean. Tasks
lose points of accuracy, domains nats of KL, and the two are never compared.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowbit_core.evals.arithmetic import Z
from lowbit_core.evals.results import Changes

TIMES = 2.0
ALL = "all"
MARK = "broke"  # beside its name


@dataclass(frozen=True)
class Loss:
    """What a part lost, and the low end of its interval: shares of a task's items, nats a token of a domain."""

    name: str
    loss: float
    low: float


@dataclass(frozen=True)
class Broken:
    """A part that broke, beside the mean of all parts."""

    name: str
    loss: float
    low: float
    mean: float

    @property
    def words(self) -> str:
        """How far above the mean it is."""
        return (
            f"{self.loss / self.mean:.1f} times the mean" if self.mean > 0 else "where the mean lost nothing"
        )


def broken_of(losses: Sequence[Loss]) -> list[Broken]:
    """The parts that broke, the worst first; none of fewer than two."""
    if len(losses) < 2:
        return []
    mean = sum(one.loss for one in losses) / len(losses)
    found = [
        Broken(one.name, one.loss, one.low, mean)
        for one in losses
        if one.low > max(0.0, mean) and one.loss >= TIMES * mean
    ]
    return sorted(found, key=lambda one: -one.loss)


def broken_tasks(changed: Mapping[str, Changes]) -> list[Broken]:
    """Tasks whose accuracy (`acc_norm`) fell, from `changes_by_task`."""
    found = [
        Loss(task, -change.value, -change.high)
        for task, one in changed.items()
        if task != ALL and (change := one.acc_norm_change) is not None and change.high is not None
    ]
    return broken_of(found)


def broken_domains(domains: Mapping[str, Mapping[str, float]]) -> list[Broken]:
    """Domains of a manifest's quality; one whose error is not known (a single sequence) is never named."""
    found = [
        Loss(name, row["mean_kld"], row["mean_kld"] - Z * row.get("kld_stderr", math.inf))
        for name, row in domains.items()
        if math.isfinite(row.get("mean_kld", math.nan))
    ]
    return broken_of(found)


def said_of_task(one: Broken) -> str:
    """A line for a person."""
    return (
        f"{one.name} broke: it lost {100 * one.loss:.1f} points of acc_norm (at least {100 * one.low:.1f}), "
        f"{one.words} of {100 * one.mean:+.1f}"
    )


def said_of_domain(one: Broken) -> str:
    """A line for a person."""
    return (
        f"{one.name} broke: mean KL {one.loss:.4f} nats (at least {one.low:.4f}), {one.words} of {one.mean:.4f} "
        "over all domains"
    )
