"""A comparison for people and for programs: lines, and one JSON object. It computes nothing."""

from dataclasses import asdict
from typing import Any

from lowbit_core.evals.arithmetic import Estimate
from lowbit_loadtest.compare.comparison import Comparison
from lowbit_loadtest.compare.latencies import Difference
from lowbit_loadtest.compare.outcomes import OutcomeShare
from lowbit_loadtest.compare.side import at_text

VERDICTS = {
    "a_completed_nothing": "A completed no request: there is nothing to compare with",
    "b_completed_nothing": "B completed no request",
}


def lines(comparison: Comparison) -> list[str]:
    """Outcomes first, then metrics, then what weakens them, then the verdict."""
    how = "paired by request" if comparison.paired else "not paired: other tools, scenarios or seeds"
    return [
        f"B against A, {how}; 95 % intervals, each for itself",
        *map(outcome_line, comparison.outcomes),
        *map(difference_line, comparison.differences),
        *(f"note: {note}" for note in comparison.notes),
        f"verdict: {verdict_text(comparison)}",
    ]


def verdict_text(comparison: Comparison) -> str:
    """The one word, or the sentence of a side that completed nothing."""
    return VERDICTS.get(comparison.verdict, comparison.verdict)


def outcome_line(one: OutcomeShare) -> str:
    counts = f"{one.count_a} to {one.count_b}, {share_text(one.share_a)} to {share_text(one.share_b)}"
    change = (
        f"{100 * one.change:+.1f} points [{100 * one.interval.low:+.1f} to {100 * one.interval.high:+.1f}]"
    )
    verdict = f"  {one.verdict}" if one.verdict else ""
    return f"{one.outcome + at_text(one.at):<48} {counts}  {change}{verdict}"


def share_text(one: Estimate) -> str:
    """`98.0 % [95.1–99.2]`."""
    return f"{100 * one.value:.1f} % [{100 * (one.low or 0.0):.1f}–{100 * (one.high or 0.0):.1f}]"


def difference_line(one: Difference) -> str:
    spread = f" [{one.interval.low:+.1%} to {one.interval.high:+.1%}]" if one.interval else " (no interval)"
    numbers = f"{one.a:.4g} to {one.b:.4g}  {one.change:+.1%}{spread}"
    return f"{one.metric + at_text(one.at):<48} {numbers}  {judged_text(one)}"


def judged_text(one: Difference) -> str:
    """The verdict, and what made it differ from that of the numbers beside it."""
    if one.completed_alone is None:
        return one.verdict
    return f"{one.verdict} (of completed requests alone: {one.completed_alone}; a failure counts as never answered)"


def as_document(
    comparison: Comparison, names: tuple[str, str], tolerances: dict[str, float]
) -> dict[str, Any]:
    """The comparison as JSON."""
    return {
        "kind": "lowbit.compare",
        "a": names[0],
        "b": names[1],
        **tolerances,
        "verdict": comparison.verdict,
        **asdict(comparison),
    }
