"""The story of a comparison: outcomes first, then latencies, what is measured by repetition, and quality; a verdict.

A difference is a verdict only when its interval excludes zero *and* it is larger than the tolerance; "same" needs the
whole interval inside the tolerance; everything else is undecided, and more repetitions would help. A side without one
completed request is no matter of tolerances: it has a verdict of its own.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lowbit_core.errors import ConfigError
from lowbit_core.evals.arithmetic import Estimate, paired_change
from lowbit_core.evals.results import changes, perplexity
from lowbit_loadtest.compare.latencies import FEWEST, Difference, latency_differences
from lowbit_loadtest.compare.outcomes import DRAWS, OutcomeShare, Verdict, judge, outcome_shares
from lowbit_loadtest.compare.side import (
    COMPLETED,
    JOULES,
    OUTPUT_RATE,
    PRICE,
    At,
    Load,
    Side,
    at_text,
)
from lowbit_loadtest.report.statistics import Bounds, student_difference, student_mean

Whole = Literal["better", "worse", "same", "undecided", "a_completed_nothing", "b_completed_nothing"]
LOWER_IS_BETTER = {OUTPUT_RATE: False, JOULES: True, PRICE: True}
COMPLETED_TOLERANCE = 0.01


@dataclass(frozen=True)
class Comparison:
    """All differences of two results. `notes` say what weakens them: few requests, other tools, what is missing."""

    paired: bool
    tools: tuple[str, str]
    completed: tuple[int, int]
    outcomes: tuple[OutcomeShare, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    @property
    def verdicts(self) -> set[Verdict]:
        """Of every outcome and metric."""
        outcomes = {one.verdict for one in self.outcomes if one.verdict is not None}
        return outcomes | {one.verdict for one in self.differences}

    @property
    def verdict(self) -> Whole:
        """The worst that is certain; "undecided" unless something is."""
        if not self.completed[1]:
            return "b_completed_nothing"
        if not self.completed[0]:
            return "a_completed_nothing"
        order: tuple[Verdict, ...] = ("worse", "undecided", "better", "same")
        return next((verdict for verdict in order if verdict in self.verdicts), "undecided")


def compare(
    a: Side,
    b: Side,
    tolerance: float,
    completed_tolerance: float = COMPLETED_TOLERANCE,
    seed: int = 0,
    draws: int = DRAWS,
) -> Comparison:
    """Compare two results load by load; ConfigError where they have none in common."""
    paired = a.asked is not None and a.asked == b.asked
    outcomes: list[OutcomeShare] = []
    differences: list[Difference] = []
    loads = common_loads(a, b)
    for one, other in loads:
        outcomes += outcome_shares(one, other, completed_tolerance, seed, draws)
        differences += latency_differences(one, other, paired, tolerance, seed, draws)
        differences += _per_repetition(one, other, paired, tolerance)
    differences += _quality(a, b, tolerance)
    if not outcomes and not differences:
        raise ConfigError(f"the two results have no load in common: A has {_loads(a)}, B has {_loads(b)}")
    completed = a.completed, b.completed
    return Comparison(
        paired, (a.tool, b.tool), completed, tuple(outcomes), tuple(differences), _notes(a, b, loads)
    )


def common_loads(a: Side, b: Side) -> list[tuple[Load, Load]]:
    """Loads by what was offered; two results of one load each are compared whatever that was."""
    if len(a.loads) == len(b.loads) == 1:
        return [(a.loads[0], b.loads[0])]
    of_b = {load.at: load for load in b.loads}
    return [(load, of_b[load.at]) for load in a.loads if load.at in of_b]


def _loads(one: Side) -> str:
    return "; ".join(at_text(load.at).removeprefix(" at ") or "one load" for load in one.loads) or "none"


def _per_repetition(a: Load, b: Load, paired: bool, tolerance: float) -> list[Difference]:
    """Output tokens/s of a closed loop (at a given rate of arrivals it is the rate's), joules and money of both."""
    found = []
    for metric, lower_is_better in LOWER_IS_BETTER.items():
        of_a, of_b = a.per_repetition.get(metric, ()), b.per_repetition.get(metric, ())
        is_pace = metric == OUTPUT_RATE and not (a.is_closed and b.is_closed)
        if not is_pace and of_a and of_b and all([*of_a, *of_b]):
            found.append(_rate(metric, a.at or b.at, of_a, of_b, paired, tolerance, lower_is_better))
    return found


def _rate(
    metric: str,
    at: At,
    of_a: tuple[float, ...],
    of_b: tuple[float, ...],
    paired: bool,
    tolerance: float,
    lower_is_better: bool,
) -> Difference:
    """One number a repetition: the mean ratio, judged by Student's t."""
    logs_a, logs_b = np.log(of_a), np.log(of_b)
    together = paired and len(of_a) == len(of_b)
    bounds = student_mean(logs_b - logs_a) if together else student_difference(logs_a, logs_b)
    interval = Bounds(float(np.expm1(bounds.low)), float(np.expm1(bounds.high))) if bounds else None
    a, b = float(np.exp(logs_a.mean())), float(np.exp(logs_b.mean()))
    verdict = judge(b / a - 1, interval, tolerance, lower_is_better)
    return Difference(metric, at, a, b, b / a - 1, interval, verdict, lower_is_better)


def _quality(a: Side, b: Side, tolerance: float) -> list[Difference]:
    """Right answers, and perplexity of the texts, under load. Without an answer a question is answered wrong."""
    differences = []
    both = [
        (one, b.answers[key]) for key, one in a.answers.items() if key in b.answers and one.kind != "text"
    ]
    asked = [(one, other) for one, other in both if one.acc_norm is not None or other.acc_norm is not None]
    right_a, right_b = (sum(bool(pair[side].acc_norm) for pair in asked) for side in (0, 1))
    if right_a:
        lost = sum(bool(one.acc_norm) and not other.acc_norm for one, other in asked)
        share, after = right_a / len(asked), right_b / len(asked)
        found = paired_change(lost, right_b - right_a + lost, len(asked))
        bounds = _bounds(found, 0.0, share)
        verdict = judge(after / share - 1, bounds, tolerance, lower_is_better=False)
        differences.append(
            Difference("acc_norm", (), share, after, after / share - 1, bounds, verdict, False)
        )
    if ratio := changes(a.answers, b.answers).perplexity_ratio:
        texts = [one for key, one in a.answers.items() if key in b.answers and one.kind == "text"]
        value, bounds = perplexity(texts).value, _bounds(ratio, 1.0, 1.0)
        verdict = judge(ratio.value - 1, bounds, tolerance, lower_is_better=True)
        change = ratio.value - 1
        differences.append(Difference("perplexity", (), value, value * ratio.value, change, bounds, verdict))
    return differences


def _bounds(one: Estimate, nothing: float, unit: float) -> Bounds | None:
    """The interval relative to what no change is; None where nothing is known of the spread."""
    if one.low is None or one.high is None:
        return None
    return Bounds((one.low - nothing) / unit, (one.high - nothing) / unit)


def _notes(a: Side, b: Side, loads: list[tuple[Load, Load]]) -> tuple[str, ...]:
    notes = [f"{side}: {note}" for side, one in (("A", a), ("B", b)) for note in one.notes]
    if a.tool != b.tool:
        notes.append(f"A is of {a.tool}, B of {b.tool}: their clocks and definitions are not quite the same")
    for pair in loads:
        for side, load in zip("AB", pair, strict=True):
            done = load.counts.get(COMPLETED, 0)
            if load.total and done < FEWEST:
                few = f"{side} completed {done} of {load.total} requests{at_text(load.at)}"
                notes.append(f"{few}: too few to say much of latencies (from {FEWEST} on they are judged)")
    notes += [f"{side} lacks {what}" for side, one in (("A", a), ("B", b)) for what in one.missing]
    return tuple(notes)
