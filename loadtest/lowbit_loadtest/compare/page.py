"""A comparison as one page: the verdict, how requests ended, and each change with its interval. It computes nothing."""

from dataclasses import replace

from lowbit_core.evals.arithmetic import Estimate
from lowbit_core.pages.chart import GREY, Chart, Table
from lowbit_core.pages.html import heading, page, paragraph, verdict
from lowbit_core.pages.plots import Bar, Member, intervals, stacked_bars
from lowbit_loadtest.compare.comparison import Comparison
from lowbit_loadtest.compare.side import At, at_text
from lowbit_loadtest.compare.text import judged_text, share_text, verdict_text

KINDS = {"better": "good", "same": "good", "undecided": "open"}
VERDICT_COLORS = {"better": "#2b8a3e", "same": "#0b62a4", "undecided": "#e67700", "worse": "#c92a2a"}
OUTCOME_COLORS = {"completed": "#0b62a4", "rejected": "#f08c00", "failed": "#c92a2a", "not sent": GREY}


def as_html(comparison: Comparison, names: tuple[str, str], tolerances: dict[str, float]) -> str:
    """The page; `names` are the files of A and B."""
    how = "paired by request" if comparison.paired else "not paired: other tools, scenarios or seeds"
    about = (
        f"A is {names[0]} ({comparison.tools[0]}), B is {names[1]} ({comparison.tools[1]}), {how}. Brackets and bars "
        "are 95 % intervals, each for itself. Latencies are of completed requests; a verdict counts a failed request "
        "as never answered."
    )
    sentence = f"B against A: {verdict_text(comparison)}"
    parts: list[str | Chart] = [
        heading("Load tests compared"),
        paragraph(about, "quiet"),
        verdict(KINDS.get(comparison.verdict, "bad"), sentence, comparison.notes),
        *([paragraph(f"Compared{at_text(places[0])}.")] if len(places := _places(comparison)) == 1 else []),
        "<h2>How the requests ended</h2>",
        replace(_outcome_bars(comparison), table=_outcome_table(comparison)),
        *_what_changed(comparison, tolerances["tolerance"]),
    ]
    return page("Load tests compared", parts)


def _what_changed(comparison: Comparison, tolerance: float) -> list[str | Chart]:
    """Nothing where a side completed nothing."""
    if not comparison.differences:
        return []
    return [
        "<h2>What changed</h2>",
        replace(_changes(comparison, tolerance), table=_difference_table(comparison)),
    ]


def _outcome_table(comparison: Comparison) -> Table:
    rows = [
        [
            one.outcome + _at(comparison, one.at),
            f"{one.count_a}, {share_text(one.share_a)}",
            f"{one.count_b}, {share_text(one.share_b)}",
            f"{100 * one.change:+.1f} points [{100 * one.interval.low:+.1f} to {100 * one.interval.high:+.1f}]",
            one.verdict or "",
        ]
        for one in comparison.outcomes
    ]
    return Table(["ended", "A", "B", "change", "verdict"], rows)


def _outcome_bars(comparison: Comparison) -> Chart:
    outcomes, bars = comparison.outcomes, []
    for at in dict.fromkeys(one.at for one in outcomes):
        here = [one for one in outcomes if one.at == at]
        for side, counts in (
            ("A", {one.outcome: float(one.count_a) for one in here}),
            ("B", {one.outcome: float(one.count_b) for one in here}),
        ):
            bars.append(
                Bar(side + _at(comparison, at), counts, f"{counts.get('completed', 0):.0f} completed")
            )
    seen = {one.outcome for one in outcomes}
    colors = {name: color for name, color in OUTCOME_COLORS.items() if name in seen}
    return stacked_bars("requests by how they ended", bars, colors, "requests")


def _difference_table(comparison: Comparison) -> Table:
    rows = []
    for one in comparison.differences:
        spread = f" [{one.interval.low:+.1%} to {one.interval.high:+.1%}]" if one.interval else ""
        cells = f"{one.a:.4g}", f"{one.b:.4g}", f"{one.change:+.1%}{spread}", judged_text(one)
        rows.append([one.metric + _at(comparison, one.at), *cells])
    return Table(["metric", "A", "B", "change", "verdict"], rows)


def _at(comparison: Comparison, at: At) -> str:
    """What was offered, where there are several."""
    return at_text(at) if len(_places(comparison)) > 1 else ""


def _places(comparison: Comparison) -> list[At]:
    both = [one.at for one in comparison.outcomes] + [one.at for one in comparison.differences]
    return list(dict.fromkeys(at for at in both if at))


def _changes(comparison: Comparison, tolerance: float) -> Chart:
    """One row a metric, in percent, around the band that the tolerance leaves."""
    groups = {
        one.metric + _at(comparison, one.at): [
            Member(
                "",
                VERDICT_COLORS[one.verdict],
                Estimate(
                    one.change,
                    one.interval.low if one.interval else None,
                    one.interval.high if one.interval else None,
                ),
                one.verdict,
            )
        ]
        for one in comparison.differences
    }
    note = f"the grey band is the tolerance, ±{tolerance:.0%}; of latencies, joules and money less is better"
    return intervals("change from A to B", groups, "change from A to B", "{:+.1%}", 0.0, tolerance, note)
