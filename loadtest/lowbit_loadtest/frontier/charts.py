"""The frontier's pictures as inline SVG: a scatter with error bars both ways, dots by group, stacked bars.

Every checkpoint has one colour in all of them. No scripts, no fonts, no other files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from lowbit_core.evals.arithmetic import Estimate
from lowbit_loadtest.report.svg import COLORS, ticks

WIDTH = 720
LEFT, RIGHT, TOP, BOTTOM = 72, 24, 16, 48
GRID, AXIS, FAINT = "#e9ecef", "#868e96", "#adb5bd"
LABEL_HEIGHT, LABEL_WIDTH = 15, 110


@dataclass(frozen=True)
class Scale:
    """From values to pixels; `first` and `last` are the ends of the axis."""

    first: float
    last: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = (value - self.first) / (self.last - self.first)
        return round(self.start + share * (self.end - self.start), 1)


@dataclass(frozen=True)
class Spot:
    """A checkpoint in a scatter."""

    name: str
    color: str
    x: Estimate
    y: Estimate


def color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def scatter(
    spots: Sequence[Spot], frontier: Sequence[str], x_name: str, y_name: str, percent: bool = False
) -> str:
    """Points with error bars, and the steps of the Pareto frontier behind them; each point carries its name."""
    height = 430
    x_ticks = ticks(*_range([one.x for one in spots]))
    y_ticks = ticks(*_range([one.y for one in spots]))
    x = Scale(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT)
    y = Scale(y_ticks[0], y_ticks[-1], height - BOTTOM, TOP)
    parts = [_frame(x, y, x_ticks, y_ticks, height, x_name, y_name, percent)]
    best = sorted((one for one in spots if one.name in frontier), key=lambda one: one.x.value)
    if best:
        parts.append(_steps(best, x, y))
    labels = _label_heights({one.name: y.at(one.y.value) for one in spots})
    for one in spots:
        right = _right_is_free(one, spots, x, y)
        parts.append(_spot(one, x, y, labels[one.name], right, one.name in frontier))
    return _svg(height, parts, f"{y_name} against {x_name}")


def _range(values: Sequence[Estimate]) -> tuple[float, float]:
    """Around all values with their intervals, with a little air."""
    lows = [one.low if one.low is not None else one.value for one in values]
    highs = [one.high if one.high is not None else one.value for one in values]
    low, high = min(lows), max(highs)
    air = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return max(0.0, low - air) if low >= 0 else low - air, high + air


def _frame(
    x: Scale,
    y: Scale,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    height: int,
    x_name: str,
    y_name: str,
    percent: bool,
) -> str:
    parts = [_x_axis(x, x_ticks, height, x_name)]
    for tick in y_ticks:
        at = y.at(tick)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}" stroke="{GRID}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4}" text-anchor="end">{_label(tick, percent)}</text>')
    parts.append(
        f'<text class="axis" transform="translate(16 {(TOP + height - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_name)}</text>"
    )
    return "".join(parts)


def _x_axis(x: Scale, x_ticks: Sequence[float], height: int, name: str, percent: bool = False) -> str:
    """Grid lines with their values, and the name below."""
    parts = []
    for tick in x_ticks:
        at = x.at(tick)
        parts.append(f'<line y1="{TOP}" y2="{height - BOTTOM}" x1="{at}" x2="{at}" stroke="{GRID}"/>')
        parts.append(
            f'<text x="{at}" y="{height - BOTTOM + 18}" text-anchor="middle">{_label(tick, percent)}</text>'
        )
    middle = (x.start + x.end) / 2
    parts.append(
        f'<text class="axis" x="{middle}" y="{height - 8}" text-anchor="middle">{escape(name)}</text>'
    )
    return "".join(parts)


def _label(tick: float, percent: bool) -> str:
    return f"{100 * tick:.3g} %" if percent else f"{tick:g}"


def _steps(best: Sequence[Spot], x: Scale, y: Scale) -> str:
    """What is at least as fast and as good as some point: down from each to the next faster one."""
    points = [f"{LEFT},{y.at(best[0].y.value)}"]
    for here, after in zip(best, [*best[1:], None], strict=True):
        points.append(f"{x.at(here.x.value)},{y.at(here.y.value)}")
        points.append(f"{x.at(here.x.value)},{y.at(after.y.value) if after else y.start}")
    return (
        f'<polyline points="{" ".join(points)}" fill="none" stroke="{FAINT}" stroke-width="2" '
        'stroke-dasharray="2 4" stroke-linecap="round"/>'
    )


def _right_is_free(one: Spot, spots: Sequence[Spot], x: Scale, y: Scale) -> bool:
    """Whether a name to the right of a spot meets neither the edge nor another spot."""
    at_x, at_y = x.at(one.x.value), y.at(one.y.value)
    near = [
        other
        for other in spots
        if 0 < x.at(other.x.value) - at_x < LABEL_WIDTH
        and -2 * LABEL_HEIGHT < y.at(other.y.value) - at_y < LABEL_HEIGHT
    ]
    return at_x < WIDTH - RIGHT - LABEL_WIDTH and not near


def _spot(one: Spot, x: Scale, y: Scale, label_y: float, right: bool, best: bool) -> str:
    at_x, at_y = x.at(one.x.value), y.at(one.y.value)
    parts = []
    if one.x.low is not None and one.x.high is not None:
        parts.append(_bar(x.at(one.x.low), at_y, x.at(one.x.high), at_y, one.color))
    if one.y.low is not None and one.y.high is not None:
        parts.append(_bar(at_x, y.at(one.y.low), at_x, y.at(one.y.high), one.color))
    fill = one.color if best else "#fff"
    parts.append(
        f'<circle cx="{at_x}" cy="{at_y}" r="6" fill="{fill}" stroke="{one.color}" stroke-width="2"/>'
    )
    text_x, anchor = (at_x + 12, "start") if right else (at_x - 12, "end")
    if abs(label_y - at_y) > LABEL_HEIGHT:
        parts.append(
            f'<line x1="{at_x}" y1="{at_y}" x2="{text_x}" y2="{label_y}" stroke="{one.color}" stroke-opacity="0.4"/>'
        )
    weight = ' font-weight="600"' if best else ""
    parts.append(
        f'<text class="name" x="{text_x}" y="{label_y - 5}" text-anchor="{anchor}" style="fill:{one.color}"{weight}>'
        f"{escape(one.name)}</text>"
    )
    return "".join(parts)


def _bar(x1: float, y1: float, x2: float, y2: float, stroke: str) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{stroke}" stroke-width="1.5" stroke-opacity="0.55"/>'


def _label_heights(wanted: Mapping[str, float]) -> dict[str, float]:
    """Heights of labels, pushed apart so that no two share a line."""
    placed: dict[str, float] = {}
    last = -1e9
    for name, at in sorted(wanted.items(), key=lambda pair: pair[1]):
        last = max(at, last + LABEL_HEIGHT)
        placed[name] = round(last, 1)
    return placed


def dots_by_group(
    groups: Mapping[str, Sequence[tuple[str, str, Estimate]]], x_name: str, percent: bool = False
) -> str:
    """One row for each group, and in it a dot with its interval for each checkpoint: (name, colour, value)."""
    row = 13
    most = max(len(members) for members in groups.values())
    block = most * row + 16
    height = TOP + BOTTOM + block * len(groups)
    left = 150
    x_ticks = ticks(*_range([value for members in groups.values() for _, _, value in members]))
    x = Scale(x_ticks[0], x_ticks[-1], left, WIDTH - RIGHT)
    parts = [_x_axis(x, x_ticks, height, x_name, percent)]
    for number, (group, members) in enumerate(groups.items()):
        top = TOP + number * block
        parts.append(f'<line x1="8" x2="{WIDTH - RIGHT}" y1="{top}" y2="{top}" stroke="{GRID}"/>')
        parts.append(
            f'<text class="name" x="{left - 14}" y="{top + block / 2 + 4}" text-anchor="end">{escape(group)}</text>'
        )
        for place, (_, stroke, value) in enumerate(members):
            y = top + 14 + place * row
            if value.low is not None and value.high is not None:
                parts.append(_bar(x.at(value.low), y, x.at(value.high), y, stroke))
            parts.append(f'<circle cx="{x.at(value.value)}" cy="{y}" r="4" fill="{stroke}"/>')
    return _svg(height, parts, x_name)


def stacked_bars(
    rows: Sequence[tuple[str, Mapping[str, float], str]], colors: Mapping[str, str], x_name: str
) -> str:
    """One bar a row: its name, the sizes of its parts, and a note at its end."""
    row, left, right = 34, 150, 190
    height = TOP + BOTTOM + row * len(rows)
    most = max((sum(parts.values()) for _, parts, _ in rows), default=1.0)
    x_ticks = ticks(0.0, most)
    x = Scale(0.0, x_ticks[-1], left, WIDTH - right)
    parts = [_x_axis(x, x_ticks, height, x_name)]
    for number, (name, sizes, note) in enumerate(rows):
        y, begin = TOP + number * row + 6, 0.0
        parts.append(
            f'<text class="name" x="{left - 14}" y="{y + 15}" text-anchor="end">{escape(name)}</text>'
        )
        for component, size in sizes.items():
            start, end = x.at(begin), x.at(begin + size)
            parts.append(
                f'<rect x="{start}" y="{y}" width="{round(end - start, 1)}" height="{row - 12}" '
                f'fill="{colors[component]}"/>'
            )
            begin += size
        parts.append(f'<text x="{x.at(begin) + 8}" y="{y + 15}">{escape(note)}</text>')
    return _svg(height, parts, x_name)


def legend(names: Mapping[str, str]) -> str:
    """Names with their colours."""
    items = "".join(
        f'<span class="key"><span class="swatch" style="background:{stroke}"></span>{escape(name)}</span>'
        for name, stroke in names.items()
    )
    return f'<p class="legend">{items}</p>'


def _svg(height: int, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
