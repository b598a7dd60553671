"""Charts in one look, as Vega-Lite specifications (vega.github.io/vega-lite), each with its numbers as a table.

A specification is data: it names values and channels, and the library in the page (`html.py`) draws it as SVG, as wide
as the page is, so that it is as sharp in print and on a phone. Series differ in colour, in shape and in dashes, so that
they can be told apart in black and white; a click in the legend leaves one alone, and marks tell their numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Spec = dict[str, Any]

COLORS = ("#0b62a4", "#c4560c", "#2b8a3e", "#862e9c", "#5c5f66", "#c2255c", "#0c8599", "#846358")
GREY, DARK, GRID = "#868e96", "#343a40", "#e9ecef"
HEIGHT = 270
NARROWEST = 300  # px that a legend may count on: a phone
LETTER, SYMBOL = 7, 34  # px of a letter and of a symbol in a legend
CONFIG: Spec = {
    "font": 'system-ui, "DejaVu Sans", sans-serif',
    "view": {"stroke": None},
    "axis": {
        "gridColor": GRID,
        "domainColor": GREY,
        "tickColor": GREY,
        "labelColor": DARK,
        "titleColor": DARK,
        "labelFontSize": 12,
        "titleFontSize": 12.5,
        "titleFontWeight": "normal",
        "labelOverlap": "greedy",
        "tickCount": 6,
    },
    "legend": {"labelFontSize": 12.5, "labelColor": DARK, "labelLimit": 220, "symbolSize": 90},
    "text": {"fontSize": 12, "color": DARK},
}


@dataclass(frozen=True)
class Table:
    """Cells as they are read; the first column names the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chart:
    """A picture and the numbers in it; `spec` is None where there is nothing to draw."""

    title: str
    spec: Spec | None
    table: Table
    note: str = ""


@dataclass(frozen=True)
class Mark:
    """A point; `low` and `high` are the ends of its interval. A text for `x` is a place in an order."""

    x: float | str
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Marks of one colour: by default that of their place."""

    name: str
    marks: Sequence[Mark]
    color: str | None = None


def lines(
    title: str,
    x_name: str,
    y_name: str,
    series: Sequence[Series],
    limits: Mapping[str, float] | None = None,
    note: str = "",
    log: bool = False,
) -> Chart:
    """A line for each series, with points and intervals; `limits` are dashed horizontals with a name each.

    On a `log` scale what is not positive stands in the table alone.
    """
    drawn = [one for one in series if one.marks]
    table = by_x(x_name, drawn, y_name)
    if not drawn:
        return Chart(title, None, table, note)
    values = [
        {"series": one.name, "x": mark.x, "y": mark.y, **_bounds(mark.low, mark.high, log)}
        for one in drawn
        for mark in one.marks
        if mark.y > 0 or not log
    ]
    if not values:
        return Chart(title, None, table, note)
    in_order = isinstance(drawn[0].marks[0].x, str)
    x = {
        "field": "x",
        "title": x_name,
        **({"type": "ordinal", "sort": None} if in_order else _number(x_name)),
    }
    if in_order:
        x["axis"] = {"labelAngle": 0}
    elif all(isinstance(mark.x, int) for one in drawn for mark in one.marks):
        x["axis"] = {"tickMinStep": 1}
    names = {one.name: one.color or COLORS[place % len(COLORS)] for place, one in enumerate(drawn)}
    y = {"field": "y", **_number(y_name), **({"scale": {"type": "log", "nice": False}} if log else {})}
    spec = layered(values, series_layers(x, y, names, y_name))
    spec["layer"] += [layer for name, value in (limits or {}).items() for layer in _limit(name, value)]
    return Chart(title, spec, table, note)


def _bounds(low: float | None, high: float | None, log: bool) -> dict[str, float | None]:
    """Of an interval that can be drawn; on a log scale it has a positive one."""
    return {"low": None, "high": None} if log and (low or 0.0) <= 0 else {"low": low, "high": high}


def _number(name: str) -> Spec:
    return {"type": "quantitative", "title": name}


def by_x(x_name: str, series: Sequence[Series], y_name: str) -> Table:
    """Rows by x, a column for each series, the interval in brackets."""
    places = list(dict.fromkeys(mark.x for one in series for mark in one.marks))
    cells = {(one.name, mark.x): mark_text(mark) for one in series for mark in one.marks}
    columns = [one.name if len(series) > 1 else y_name for one in series]
    rows = [[_x_text(x), *(cells.get((one.name, x), "–") for one in series)] for x in places]
    return Table([x_name, *columns], rows)


def _x_text(x: float | str) -> str:
    return x if isinstance(x, str) else f"{x:.4g}"


def mark_text(mark: Mark) -> str:
    if mark.low is None or mark.high is None:
        return f"{mark.y:.4g}"
    return f"{mark.y:.4g} [{mark.low:.4g}–{mark.high:.4g}]"


def layered(values: Sequence[Mapping[str, Any]], layers: Sequence[Spec], height: Any = HEIGHT) -> Spec:
    """A whole specification, as wide as its place in the page."""
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "data": {"values": list(values)},
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "config": CONFIG,
        "layer": list(layers),
    }


def series_layers(x: Spec, y: Spec, names: Mapping[str, str], y_name: str) -> list[Spec]:
    """Lines, intervals and points of `series`."""
    look = series_channels(names)
    dimmed = {"condition": {"param": "shown", "value": 1, "empty": True}, "value": 0.1}
    tooltip = [
        *([{"field": "series", "type": "nominal", "title": "series"}] if len(names) > 1 else []),
        {"field": "x", "type": x["type"], "title": x["title"]},
        *(
            {"field": name, "type": "quantitative", "title": title, "format": ".4~g"}
            for name, title in (("y", y_name), ("low", "from"), ("high", "to"))
        ),
    ]
    color = {"color": look["color"], "opacity": dimmed}
    return [
        {
            "params": [
                {"name": "shown", "select": {"type": "point", "fields": ["series"]}, "bind": "legend"}
            ],
            "mark": {"type": "line", "strokeWidth": 2},
            "encoding": {"x": x, "y": y, "strokeDash": look["strokeDash"], **color},
        },
        {
            "transform": [{"filter": "isValid(datum.low) && isValid(datum.high)"}],
            "mark": {"type": "rule", "strokeWidth": 1.4},
            "encoding": {
                "x": x,
                "y": {**y, "field": "low"},
                "y2": {"field": "high"},
                **color,
            },
        },
        {
            "mark": {"type": "point", "filled": True, "size": 55},
            "encoding": {"x": x, "y": y, "shape": look["shape"], "tooltip": tooltip, **color},
        },
    ]


def series_channels(names: Mapping[str, str]) -> Spec:
    """Colour, dash and shape by the field `series`, with one legend that fits a phone; none for a single series."""
    widest = LETTER * max(map(len, names)) + SYMBOL
    legend: Spec | None = None
    if len(names) > 1:
        columns = max(1, min(len(names), NARROWEST // widest))
        legend = {"orient": "top", "title": None, "columns": columns, "symbolStrokeWidth": 0}
    color_scale = {"domain": list(names), "range": list(names.values())}
    both: Spec = {"field": "series", "type": "nominal", "legend": legend}
    return {
        "color": {**both, "scale": color_scale},
        "shape": {**both, "scale": {"domain": list(names)}},
        "strokeDash": {**both, "scale": {"domain": list(names)}},
    }


def _limit(name: str, value: float) -> list[Spec]:
    data = {"values": [{"limit": value, "name": name}]}
    y = {"field": "limit", "type": "quantitative"}
    return [
        {"data": data, "mark": {"type": "rule", "strokeDash": [6, 4], "color": GREY}, "encoding": {"y": y}},
        {
            "data": data,
            "mark": {"type": "text", "align": "right", "dy": -6, "dx": -4},
            "encoding": {"y": y, "x": {"value": "width"}, "text": {"field": "name"}},
        },
    ]
