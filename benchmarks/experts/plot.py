"""Quality against bytes as a picture: `python benchmarks/experts/plot.py RESULT.json` writes RESULT.svg beside it.

Mean KL on a logarithmic axis over the checkpoint's size, one line for each share of pruned experts, a point for each
width. The unpruned model in 16 bits is the base, whose KL is 0: it has no place here. Standard library only.
"""

import json
import math
import sys
from pathlib import Path

from tables import frontier_points

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 44, 52
COLORS = ("#2b8a3e", "#0b62a4", "#c4560c")
LOW, HIGH = -5, 0  # powers of ten on the axis of KL
STEP_BYTES = 5_000_000


def picture(points: list[tuple[int, float, int, float]]) -> str:
    """The points of `tables.frontier_points` as SVG."""
    last = math.ceil(max(size for size, *_ in points) / STEP_BYTES) * STEP_BYTES
    body = [axes(last)]
    for color, share in zip(COLORS, sorted({share for _, share, *_ in points}), strict=True):
        places = [
            (x_of(size, last), y_of(kld), bits) for size, pruned, bits, kld in points if pruned == share
        ]
        line = " ".join(f"{x},{y}" for x, y, _ in places)
        body.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        body += [dot(*place, color) for place in places]
        body.append(
            f'<text x="{LEFT + 12 + 140 * COLORS.index(color)}" y="26" fill="{color}">&#9632; {share:.0%} pruned</text>'
        )
    style = 'font-family="sans-serif" font-size="12" style="background:#fff"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {style}>{"".join(body)}</svg>\n'


def x_of(size: float, last: float) -> float:
    return round(LEFT + size / last * (WIDTH - LEFT - RIGHT), 1)


def y_of(kld: float) -> float:
    return round(TOP + (HIGH - math.log10(kld)) / (HIGH - LOW) * (HEIGHT - TOP - BOTTOM), 1)


def dot(x: float, y: float, bits: int, color: str) -> str:
    circle = f'<circle cx="{x}" cy="{y}" r="4" fill="{color}"/>'
    return circle + f'<text x="{x}" y="{y - 8}" text-anchor="middle" fill="{color}">{bits} bits</text>'


def axes(last: int) -> str:
    floor = HEIGHT - BOTTOM
    lines = [
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(10**power)}" y2="{y_of(10**power)}" stroke="#dee2e6"/>'
        f'<text x="{LEFT - 8}" y="{y_of(10**power) + 4}" text-anchor="end">{10**power:g}</text>'
        for power in range(LOW, HIGH + 1)
    ]
    lines += [
        f'<text x="{x_of(size, last)}" y="{floor + 18}" text-anchor="middle">{size / 1e6:g}</text>'
        for size in range(0, last + 1, STEP_BYTES)
    ]
    names = (
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">checkpoint, MB</text>'
    )
    middle = (TOP + floor) / 2
    turned = f'<text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">mean KL, nats</text>'
    return "".join(lines) + names + turned


if __name__ == "__main__":
    source = Path(sys.argv[1])
    runs = json.loads(source.read_text(encoding="utf-8"))["runs"]
    source.with_suffix(".svg").write_text(picture(frontier_points(runs)), encoding="utf-8")
