"""What was predicted of a plan beside what came, as a page."""

from collections.abc import Mapping, Sequence

from lowbit_core.pages.chart import Table
from lowbit_core.pages.html import heading, page, paragraph, verdict, wide
from lowbit_plan.latency import Latency
from lowbit_plan.outcome import Outcome


def as_html(
    model: str, candidate: str, outcomes: Sequence[Outcome], latencies: Mapping[str, Latency], closeness: str
) -> str:
    """The whole page; `latencies` are the predicted ones, by name."""
    missed = [str(one) for one in outcomes if one.met is False]
    sentence = "Every target is met by what was measured." if not missed else "Not every target is met."
    title = f"{model}: {candidate}, predicted and measured"
    return page(
        title,
        [
            heading(title),
            verdict("bad" if missed else "good", sentence, missed),
            wide(outcome_table(outcomes)),
            "<h2>What takes the time, as predicted</h2>",
            wide(parts_table(latencies)),
            paragraph(closeness, "quiet"),
        ],
    )


def outcome_table(outcomes: Sequence[Outcome]) -> Table:
    """A row for each thing that was predicted and measured."""
    rows = [
        [
            one.name,
            "not predicted" if one.predicted is None else one.amount(one.predicted),
            one.amount(one.measured),
            "–" if one.off is None else f"{one.off:+.1%}",
            "–" if one.limit is None else one.amount(one.limit),
            {None: "–", True: "met", False: "missed"}[one.met],
        ]
        for one in outcomes
    ]
    return Table(["", "predicted", "measured", "off by", "target", ""], rows)


def parts_table(latencies: Mapping[str, Latency]) -> Table:
    """A column for each latency, a row for each part of it, in milliseconds."""
    names = list(next(iter(latencies.values())).parts())
    rows = [[name, *(f"{1e3 * one.parts()[name]:.2f} ms" for one in latencies.values())] for name in names]
    return Table(
        ["", *latencies], [*rows, ["together", *(f"{1e3 * one.total:.2f} ms" for one in latencies.values())]]
    )
