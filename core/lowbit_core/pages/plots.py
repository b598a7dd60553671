"""The charts that are not lines: a scatter with steps, rows of intervals, stacked bars, a dot for each request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowbit_core.evals.arithmetic import Estimate, span
from lowbit_core.pages.chart import (
    DARK,
    GREY,
    GRID,
    Chart,
    Spec,
    Table,
    layered,
    series_channels,
)

ROW = 19  # px
AIR = 0.06  # of the range, around the outermost values


@dataclass(frozen=True)
class Spot:
    """A thing in a scatter, with intervals both ways."""

    name: str
    color: str
    x: Estimate
    y: Estimate


@dataclass(frozen=True)
class Member:
    """One interval in a row: its name, colour and value."""

    name: str
    color: str
    value: Estimate
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """One bar: the sizes of its parts, and a note beside its name."""

    name: str
    parts: Mapping[str, float]
    note: str = ""


def scatter(
    title: str,
    spots: Sequence[Spot],
    frontier: Sequence[str],
    x_name: str,
    y_name: str,
    percent: bool = False,
    note: str = "",
) -> Chart:
    """Points with error bars, and the steps of the Pareto frontier behind them."""
    form = "{:.1%}" if percent else "{:.4g}"
    rows = [[one.name, span(one.x, "{:.4g}"), span(one.y, form)] for one in spots]
    table = Table(["", x_name, y_name], rows)
    if not spots:
        return Chart(title, None, table, note)
    x_domain, y_domain = _around([one.x for one in spots]), _around([one.y for one in spots])
    values = [{"series": one.name, **_ends("x", one.x), **_ends("y", one.y)} for one in spots]
    x = _axis("x", x_name, x_domain)
    y = _axis("y", y_name, y_domain, ".0%" if percent and y_domain[1] - y_domain[0] > 0.05 else None, percent)
    names = {one.name: one.color for one in spots}
    look = series_channels(names)
    tooltip = [
        {"field": "series", "type": "nominal", "title": " "},
        {"field": "x", "type": "quantitative", "title": x_name, "format": ".4~g"},
        {"field": "y", "type": "quantitative", "title": y_name, "format": ".1%" if percent else ".4~g"},
    ]
    layers: list[Spec] = [
        {
            "data": {"values": _steps(spots, frontier, x_domain[0], y_domain[0])},
            "mark": {"type": "line", "interpolate": "step-before", "strokeDash": [2, 5], "color": GREY},
            "encoding": {"x": x, "y": y, "order": {"field": "order"}},
        },
        _bar_of("x", y, look["color"]),
        _bar_of("y", x, look["color"]),
        {
            "mark": {"type": "point", "filled": True, "size": 130},
            "encoding": {"x": x, "y": y, "color": look["color"], "shape": look["shape"], "tooltip": tooltip},
        },
    ]
    return Chart(title, layered(values, layers, 340), table, note)


def _around(values: Sequence[Estimate]) -> list[float]:
    """All values with their intervals, and a little air."""
    low = min(one.value if one.low is None else one.low for one in values)
    high = max(one.value if one.high is None else one.high for one in values)
    air = AIR * (high - low) or 0.05 * abs(high) or 1.0
    return [max(0.0, low - air) if low >= 0 else low - air, high + air]


def _ends(channel: str, one: Estimate) -> dict[str, float | None]:
    return {channel: one.value, f"{channel}_low": one.low, f"{channel}_high": one.high}


def _axis(
    field: str, name: str, domain: Sequence[float], form: str | None = None, percent: bool = False
) -> Spec:
    form = form or (".1%" if percent else None)
    axis = {"axis": {"format": form}} if form else {}
    scale = {"domain": list(domain), "nice": True, "zero": False}
    return {"field": field, "type": "quantitative", "title": name, "scale": scale, **axis}


def _bar_of(channel: str, other: Spec, color: Spec, scale: Spec | None = None) -> Spec:
    """The interval along one channel."""
    ends = {
        channel: {"field": f"{channel}_low", "type": "quantitative", **({"scale": scale} if scale else {})},
        f"{channel}2": {"field": f"{channel}_high"},
    }
    across = "y" if channel == "x" else "x"
    return {
        "transform": [{"filter": f"isValid(datum.{channel}_low)"}],
        "mark": {"type": "rule", "strokeWidth": 1.5, "opacity": 0.6},
        "encoding": {**ends, across: other, "color": color},
    }


def _steps(
    spots: Sequence[Spot], frontier: Sequence[str], left: float, bottom: float
) -> list[Mapping[str, Any]]:
    """What is at least as far right and up as some point: down from each to the next one on the right."""
    best = sorted((one for one in spots if one.name in frontier), key=lambda one: one.x.value)
    if not best:
        return []
    points = [
        (left, best[0].y.value),
        *((one.x.value, one.y.value) for one in best),
        (best[-1].x.value, bottom),
    ]
    return [{"x": x, "y": y, "order": place} for place, (x, y) in enumerate(points)]


def intervals(
    title: str,
    groups: Mapping[str, Sequence[Member]],
    x_name: str,
    form: str = "{:.4g}",
    zero: float | None = None,
    band: float | None = None,
    note: str = "",
    log: bool = False,
) -> Chart:
    """A group's name, and under it a dot with its interval for each member; `band` is drawn around `zero`.

    On a `log` scale what is not positive stands in the table alone.
    """
    table = _table_of(groups, x_name, form)
    groups = _on_log_scale(groups) if log else groups
    if not any(groups.values()):
        return Chart(title, None, table, note)
    rows, values = _rows_of(groups)
    shown = [one.value for members in groups.values() for one in members]
    domain = _around(
        [*shown, *([] if zero is None else [Estimate(zero, zero - (band or 0.0), zero + (band or 0.0))])]
    )
    if "%" not in form and min(domain) > 0 and zero is None:
        domain[0] = max(0.0, domain[0])
    x = _axis("x", x_name, domain, _d3(form, domain))
    if log:
        x["scale"] = {"type": "log", "nice": False}
    y = {"field": "row", "type": "ordinal", "axis": None, "scale": {"domain": list(range(rows))}}
    names = {one.name: one.color for members in groups.values() for one in members}
    look = series_channels(names)
    color = (
        look["color"]
        if len(names) > 1
        else {"field": "color", "type": "nominal", "scale": None, "legend": None}
    )
    tooltip = [
        {"field": "label", "type": "nominal", "title": " "},
        {"field": "text", "type": "nominal", "title": x_name},
    ]
    layers: list[Spec] = [
        *_band(zero, band),
        _bar_of("x", y, color, x["scale"]),
        {
            "transform": [{"filter": "isValid(datum.x)"}],
            "mark": {"type": "point", "filled": True, "size": 80},
            "encoding": {"x": x, "y": y, "color": color, "tooltip": tooltip}
            | ({"shape": look["shape"]} if len(names) > 1 else {}),
        },
        *_row_names(y),
    ]
    return Chart(title, layered(_with_text(values, groups, form), layers, {"step": ROW}), table, note)


def _on_log_scale(groups: Mapping[str, Sequence[Member]]) -> dict[str, list[Member]]:
    """Those that are positive, without an interval that is not."""

    def drawn(one: Member) -> Member:
        value, low = one.value.value, one.value.low
        return one if low is None or low > 0 else replace(one, value=Estimate(value, None, None))

    positive = {
        name: [drawn(one) for one in members if one.value.value > 0] for name, members in groups.items()
    }
    return {name: members for name, members in positive.items() if members}


def _table_of(groups: Mapping[str, Sequence[Member]], x_name: str, form: str) -> Table:
    """A row for each member."""
    texts = [
        [
            f"{group}: {one.name}" if one.name else group,
            span(one.value, form),
            *([one.note] if one.note else []),
        ]
        for group, members in groups.items()
        for one in members
    ]
    return Table(["", x_name, *([""] if any(len(row) > 2 for row in texts) else [])], texts)


def _rows_of(groups: Mapping[str, Sequence[Member]]) -> tuple[int, list[dict[str, Any]]]:
    """A row for each group's name, and one for each of its members."""
    row, values = 0, []
    for group, members in groups.items():
        values.append({"row": row, "name": group, "note": members[0].note if len(members) == 1 else ""})
        for one in members:
            row += 1
            values.append({"row": row, "series": one.name, "color": one.color, **_ends("x", one.value)})
        row += 1
    return row, values


def _with_text(
    values: list[dict[str, Any]], groups: Mapping[str, Sequence[Member]], form: str
) -> list[dict[str, Any]]:
    named = iter((group, one) for group, members in groups.items() for one in members)
    found = []
    for value in values:
        if "x" in value:
            group, one = next(named)
            value = value | {"label": f"{group} {one.name}".strip(), "text": span(one.value, form)}
        found.append(value)
    return found


def _d3(form: str, domain: Sequence[float]) -> str | None:
    """Percent with a decimal where ticks would else be the same."""
    if "%" not in form:
        return None
    return ".0%" if domain[1] - domain[0] > 0.06 else ".1%"


def _band(zero: float | None, band: float | None) -> list[Spec]:
    layers: list[Spec] = []
    if zero is not None and band:
        layers.append(
            {
                "data": {"values": [{"from": zero - band, "to": zero + band}]},
                "mark": {"type": "rect", "color": GRID, "opacity": 0.7},
                "encoding": {"x": {"field": "from", "type": "quantitative"}, "x2": {"field": "to"}},
            }
        )
    if zero is not None:
        layers.append(
            {
                "data": {"values": [{"zero": zero}]},
                "mark": {"type": "rule", "color": GREY},
                "encoding": {"x": {"field": "zero", "type": "quantitative"}},
            }
        )
    return layers


def _row_names(y: Spec) -> list[Spec]:
    """Names at the left, notes at the right, above a row's marks: no axis takes a phone's width."""
    only = [{"filter": "isValid(datum.name)"}]
    return [
        {
            "transform": only,
            "mark": {"type": "text", "align": align, "baseline": "middle", "dy": 3, "fontWeight": weight},
            "encoding": {"y": y, "x": {"value": at}, "text": {"field": field}, "color": {"value": DARK}},
        }
        for field, align, at, weight in (("name", "left", 0, 600), ("note", "right", "width", "normal"))
    ]


def stacked_bars(
    title: str, bars: Sequence[Bar], colors: Mapping[str, str], x_name: str, note: str = ""
) -> Chart:
    """One bar a row, under its name."""
    rows = [
        [one.name, *(f"{one.parts.get(part, 0.0):.4g}" for part in colors), *([one.note] if one.note else [])]
        for one in bars
    ]
    table = Table([x_name, *colors, *([""] if any(one.note for one in bars) else [])], rows)
    if not bars:
        return Chart(title, None, table, note)
    values: list[dict[str, Any]] = []
    for place, one in enumerate(bars):
        values.append({"row": 2 * place, "name": one.name, "note": one.note})
        values += [
            {"row": 2 * place + 1, "series": part, "x": one.parts[part], "order": order}
            for order, part in enumerate(colors)
            if one.parts.get(part)
        ]
    y = {"field": "row", "type": "ordinal", "axis": None, "scale": {"domain": list(range(2 * len(bars)))}}
    color = series_channels(colors)["color"]
    layers: list[Spec] = [
        {
            "transform": [{"filter": "isValid(datum.x)"}],
            "mark": {"type": "bar", "height": {"band": 0.9}, "stroke": "white", "strokeWidth": 0.5},
            "encoding": {
                "x": {"field": "x", "type": "quantitative", "title": x_name, "stack": "zero"},
                "y": y,
                "color": color,
                "order": {"field": "order", "type": "quantitative"},
                "tooltip": [
                    {"field": "series", "type": "nominal", "title": "part"},
                    {"field": "x", "type": "quantitative", "title": x_name, "format": ".4~g"},
                ],
            },
        },
        *_row_names(y),
    ]
    return Chart(title, layered(values, layers, {"step": ROW}), table, note)


def dots(
    title: str,
    x_name: str,
    y_name: str,
    points: Sequence[tuple[float, float]],
    crosses: Sequence[tuple[float, str]],
    table: Table,
    note: str = "",
) -> Chart:
    """A dot for each thing that has a value, and a cross on the floor, with its name, for each that has none."""
    values: list[dict[str, Any]] = [{"x": x, "y": y} for x, y in points]
    values += [{"x": x, "failed": name, "floor": 0} for x, name in crosses]
    if not values:
        return Chart(title, None, table, note)
    x = {"field": "x", "type": "quantitative", "title": x_name, "scale": {"nice": False}}
    y = {"type": "quantitative", "title": y_name}
    numbers = [
        {"field": name, "type": "quantitative", "title": title}
        for name, title in (("x", x_name), ("y", y_name))
    ]
    layers: list[Spec] = [
        {
            "transform": [{"filter": "isValid(datum.y)"}],
            "mark": {"type": "point", "filled": True, "size": 14, "opacity": 0.55, "color": "#0b62a4"},
            "encoding": {"x": x, "y": {"field": "y", **y}, "tooltip": numbers},
        },
        {
            "transform": [{"filter": "isValid(datum.failed)"}],
            "mark": {"type": "point", "shape": "cross", "size": 60, "color": "#c92a2a", "angle": 45},
            "encoding": {
                "x": x,
                "y": {"field": "floor", **y},
                "tooltip": [numbers[0], {"field": "failed", "type": "nominal", "title": "ended"}],
            },
        },
    ]
    return Chart(title, layered(values, layers), table, note)
