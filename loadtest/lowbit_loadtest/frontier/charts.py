"""The charts of a plan that decides: every claim with its interval, where the time went, and what the rounds gave."""

from typing import Any

from lowbit_core.evals.arithmetic import Estimate
from lowbit_core.pages.chart import Chart, Mark, Series, lines
from lowbit_core.pages.plots import Bar, Member, intervals, stacked_bars

Document = dict[str, Any]
SETTLED_COLORS = {
    "met": "#2b8a3e",
    "better": "#2b8a3e",
    "equal": "#0b62a4",
    "no worse": "#0b62a4",
    "undecided": "#e67700",
    "worse": "#c92a2a",
    "missed": "#c92a2a",
}
TIME_COLORS = {"start": "#868e96", "round": "#0b62a4", "questions": "#f08c00", "texts": "#862e9c"}
OBJECTIVES = {
    "throughput": "output tokens/s",
    "goodput": "requests/s within the SLOs",
    "latency": "s",
    "cost": "price",
}


def decision_charts(document: Document, colors: dict[str, str]) -> list[Chart]:
    """Nothing for a plan that does not decide."""
    decision = document["decision"]
    if not decision:
        return []
    measured = [claim for claim in decision["claims"] if claim["value"] is not None]
    comparisons = [claim for claim in measured if claim["margin"] is not None]
    limits = [claim for claim in measured if claim["limit"] is not None]
    names = dict.fromkeys(claim["name"] for claim in limits)
    charts = [
        _objective([claim for claim in comparisons if claim["kind"] == "round"], decision),
        _accuracy([claim for claim in comparisons if claim["kind"] == "questions"], decision),
        _kl([claim for claim in comparisons if claim["kind"] == "texts"], decision),
        *(_constraint(name, [claim for claim in limits if claim["name"] == name]) for name in names),
        _rounds(decision, colors),
        _time(decision),
    ]
    return [chart for chart in charts if chart.table.rows]


def _objective(claims: list[Document], decision: Document) -> Chart:
    """Ratios, as percent above or below 1."""
    margin = decision["margins"]["objective"]
    groups = {f"{one['one']} against {one['other']}": [_member(one, -1.0)] for one in claims}
    title = f"compared in {decision['objective']}"
    note = f"right of 0 the first is better; the grey band is the margin of ±{margin:.0%}"
    return intervals(title, groups, "better by", "{:+.1%}", 0.0, margin, note)


def _accuracy(claims: list[Document], decision: Document) -> Chart:
    margin, name = decision["margins"]["accuracy"], decision["accuracy"].replace("_", " ")
    groups = {f"{one['one']} against {one['other']}": [_member(one)] for one in claims}
    note = f"right of 0 the first is better; the grey band is the margin of ±{100 * margin:g} points"
    return intervals(f"compared in {name}", groups, "difference", "{:+.1%}", 0.0, margin, note)


def _kl(claims: list[Document], decision: Document) -> Chart:
    margin = decision["margins"].get("kl")
    groups = {f"{one['one']} against {one['other']}": [_member(one)] for one in claims}
    note = f"right of 0 the first is nearer to the base; the grey band is the margin of ±{margin} nats"
    return intervals("compared in KL from the base", groups, "nats per token", "{:+.4f}", 0.0, margin, note)


def _constraint(name: str, claims: list[Document]) -> Chart:
    """Each checkpoint's value and the limit; of accuracy how far it is above what is wanted."""
    groups = {one["one"]: [_member(one)] for one in claims}
    limit = claims[0]["limit"]
    words = name.replace("_", " ")
    is_slack = limit == 0.0
    x_name = f"{words}: above the limit" if is_slack else words
    note = "the line is the limit" if is_slack else f"the line is the limit, {limit:g}"
    return intervals(
        f"limit: {words}", groups, x_name, "{:+.1%}" if is_slack else "{:.3f}", limit, None, note
    )


def _member(claim: Document, shift: float = 0.0) -> Member:
    low, high = (None if claim[end] is None else claim[end] + shift for end in ("low", "high"))
    value = Estimate(claim["value"] + shift, low, high)
    return Member("", SETTLED_COLORS.get(claim["settled"], "#5c5f66"), value, claim["settled"])


def _rounds(decision: Document, colors: dict[str, str]) -> Chart:
    objective = decision["objective"]
    series = [
        Series(
            name,
            [Mark(float(one["number"]), one[objective]) for one in rounds if one.get(objective) is not None],
            colors.get(name),
        )
        for name, rounds in decision["rounds"].items()
    ]
    return lines(f"{objective} by round", "round", str(OBJECTIVES.get(objective, objective)), series)


def _time(decision: Document) -> Chart:
    """Minutes of each checkpoint, by what they were spent on."""
    spent: dict[str, dict[str, float]] = {}
    for step in decision["timeline"]:
        if step["checkpoint"] is not None and step["kind"] in TIME_COLORS:
            of = spent.setdefault(step["checkpoint"], {})
            of[step["kind"]] = of.get(step["kind"], 0.0) + (step["seconds"] or 0.0) / 60
    stopped = {one["name"]: "out" for one in decision["out"]}
    bars = [Bar(name, parts, stopped.get(name, "")) for name, parts in spent.items()]
    return stacked_bars("where the time went", bars, TIME_COLORS, "minutes")
