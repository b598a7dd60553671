"""Small charts as inline SVG: axes, lines with error bars, dots. No scripts, no fonts, no other files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 48
COLORS = ("#0b62a4", "#c4560c", "#2b8a3e", "#862e9c", "#5c5f66", "#c2255c", "#0c8599", "#846358")
MOST_TICKS = 6


@dataclass(frozen=True)
class Mark:
    """A point; `low` and `high` are the ends of its error bar."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Marks in one colour (by default that of their place), joined by a line unless `dots`."""

    name: str
    marks: Sequence[Mark]
    dots: bool = False
    color: str | None = None


@dataclass(frozen=True)
class Chart:
    """Axes that hold every mark; `limits` are dashed horizontal lines with a name each."""

    title: str
    x_name: str
    y_name: str
    series: Sequence[Series]
    limits: dict[str, float] = field(default_factory=dict)

    def svg(self) -> str:
        """The chart, or a sentence where there is nothing to draw."""
        marks = [mark for one in self.series for mark in one.marks]
        if not marks:
            return f"<p>{escape(self.title)}: nothing was measured.</p>"
        xs = [mark.x for mark in marks]
        tops = [mark.high if mark.high is not None else mark.y for mark in marks] + list(self.limits.values())
        x_ticks, y_ticks = ticks(min(0.0, *xs), max(xs)), ticks(0.0, max(tops))
        body = [_axes(self, x_ticks, y_ticks)]
        place = _Place(x_ticks[0], x_ticks[-1], y_ticks[-1])
        body += [_limit(place, name, value) for name, value in self.limits.items()]
        body += [
            _drawn(place, one, one.color or COLORS[index % len(COLORS)])
            for index, one in enumerate(self.series)
        ]
        legend = "".join(
            f'<span style="color:{one.color or COLORS[index % len(COLORS)]}">&#9632; {escape(one.name)}</span> '
            for index, one in enumerate(self.series)
        )
        title = escape(self.title)
        picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(body)}</svg>'
        return f"<figure><figcaption>{title}<br>{legend}</figcaption>{picture}</figure>"


@dataclass(frozen=True)
class _Place:
    """Where a value stands in the picture."""

    x_low: float
    x_high: float
    y_high: float

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - value / self.y_high * (HEIGHT - TOP - BOTTOM), 1)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`."""
    span = high - low if high > low else max(abs(high), 1.0)
    rough = span / MOST_TICKS
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough)
    first, last = math.floor(low / step), math.ceil((low + span) / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def _axes(chart: Chart, x_ticks: list[float], y_ticks: list[float]) -> str:
    place = _Place(x_ticks[0], x_ticks[-1], y_ticks[-1])
    floor = HEIGHT - BOTTOM
    lines = [
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place.y(tick)}" y2="{place.y(tick)}" stroke="#dee2e6"/>'
        f'<text x="{LEFT - 6}" y="{place.y(tick) + 4}" text-anchor="end">{tick:g}</text>'
        for tick in y_ticks
    ]
    lines += [
        f'<text x="{place.x(tick)}" y="{floor + 16}" text-anchor="middle">{tick:g}</text>' for tick in x_ticks
    ]
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + floor) / 2
    names = (
        f'<text x="{middle_x}" y="{HEIGHT - 10}" text-anchor="middle">{escape(chart.x_name)}</text>'
        f'<text transform="translate(14 {middle_y}) rotate(-90)" text-anchor="middle">{escape(chart.y_name)}</text>'
    )
    return "".join(lines) + names


def _limit(place: _Place, name: str, value: float) -> str:
    y = place.y(value)
    line = (
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#868e96" stroke-dasharray="5 4"/>'
    )
    return line + f'<text x="{WIDTH - RIGHT - 4}" y="{y - 4}" text-anchor="end">{escape(name)}</text>'


def _drawn(place: _Place, series: Series, color: str) -> str:
    radius, opacity = (2, 0.5) if series.dots else (3, 1)
    points = [(place.x(mark.x), place.y(mark.y)) for mark in series.marks]
    bars = [
        f'<line x1="{place.x(mark.x)}" x2="{place.x(mark.x)}" y1="{place.y(mark.low)}" y2="{place.y(mark.high)}" '
        f'stroke="{color}"/>'
        for mark in series.marks
        if mark.low is not None and mark.high is not None
    ]
    dots = [
        f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{color}" fill-opacity="{opacity}"/>' for x, y in points
    ]
    joined = " ".join(f"{x},{y}" for x, y in points)
    line = (
        ""
        if series.dots
        else f'<polyline points="{joined}" fill="none" stroke="{color}" stroke-width="1.5"/>'
    )
    return line + "".join(bars) + "".join(dots)
