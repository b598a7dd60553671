"""The output error of each quantized linear: by role, by layer, and the largest by name."""

import math
from collections.abc import Sequence
from dataclasses import replace

from lowbit_core.checkpoint_page.places import (
    Place,
    few_layers,
    layers_note,
    place_of,
    short,
)
from lowbit_core.checkpoint_page.spread import finite, marks, number, spread
from lowbit_core.manifest import ModuleRecord
from lowbit_core.pages.chart import COLORS, Chart, Series, Table, lines
from lowbit_core.pages.html import paragraph, wide
from lowbit_core.pages.plots import Member, intervals

MOST_ROLES = 48
LARGEST = 10  # errors that are named
OTHERS = "other roles"
ERROR = "error relative to the output"

Placed = tuple[Place, ModuleRecord]


def module_parts(modules: Sequence[ModuleRecord]) -> list[str | Chart]:
    """Charts and tables of the errors; a sentence where nothing is quantized."""
    if not modules:
        return [paragraph("No linear is quantized.")]
    placed = _few_roles([(place_of(module.name), module) for module in modules])
    lost = len(modules) - len(finite(module.error for module in modules))
    return [
        paragraph(
            "The squared error of a linear's output on the calibration text, relative to the output's own square. "
            "A mark that stands for several linears is their mean; its bar goes from the smallest to the largest.",
            "quiet",
        ),
        *([paragraph(f"{lost} errors are not finite and not drawn.", "warning")] if lost else []),
        _by_role(placed),
        *_by_layer(placed),
        f"<h3>The {min(LARGEST, len(modules))} largest</h3>",
        wide(_largest(modules)),
    ]


def _few_roles(placed: list[Placed]) -> list[Placed]:
    """Beyond `MOST_ROLES`, those with the smallest errors are taken together."""
    largest: dict[str, float] = {}
    for place, module in placed:
        largest[place.name] = max(largest.get(place.name, 0.0), *finite([module.error]), 0.0)
    kept = set(sorted(largest, key=lambda name: -largest[name])[:MOST_ROLES])
    return [
        (place if place.name in kept else Place(place.layer, "", OTHERS), module) for place, module in placed
    ]


def _by_role(placed: list[Placed]) -> Chart:
    roles: dict[str, list[ModuleRecord]] = {}
    for place, module in placed:
        roles.setdefault(place.name, []).append(module)
    known = {role: one for role, some in roles.items() if (one := spread(module.error for module in some))}
    groups = {role: [Member("", COLORS[0], one, _linears(len(roles[role])))] for role, one in known.items()}
    rows = [
        [
            role,
            str(len(some)),
            number(known[role].value if role in known else None),
            number(max(errors, default=None)),
            short("+".join(dict.fromkeys(module.scheme for module in some))),
        ]
        for role, some in roles.items()
        for errors in [finite(module.error for module in some)]
    ]
    chart = intervals("output error by role", groups, ERROR, "{:.3g}", log=True)
    return replace(chart, table=Table(["role", "linears", "mean", "largest", "scheme"], rows))


def _linears(count: int) -> str:
    return "1 linear" if count == 1 else f"{count:,} linears"


def _by_layer(placed: list[Placed]) -> list[Chart]:
    """A chart for each part of a layer, a line for each role in it; nothing of a single layer."""
    parts: dict[str, dict[str, dict[int, list[float]]]] = {}
    for place, module in placed:
        if place.layer is not None:
            roles = parts.setdefault(place.part, {})
            roles.setdefault(place.role, {}).setdefault(place.layer, []).append(module.error)
    charts = []
    for part, roles in parts.items():
        layers = {layer for by_layer in roles.values() for layer in by_layer}
        series = [Series(short(role), marks(few_layers(one))) for role, one in roles.items()]
        for first in range(0, len(series), len(COLORS)) if len(layers) > 1 else ():
            some, title = (
                series[first : first + len(COLORS)],
                f"output error by layer: {short(part) or OTHERS}",
            )
            charts.append(lines(title, "layer", ERROR, some, note=layers_note(len(layers)), log=True))
    return charts


def _largest(modules: Sequence[ModuleRecord]) -> Table:
    def error(module: ModuleRecord) -> float:
        return module.error if math.isfinite(module.error) else math.inf

    rows = [
        [
            short(module.name),
            number(module.error),
            short(module.scheme),
            "channel" if module.group_size is None else str(module.group_size),
            short(", then ".join(module.methods)),
            number(module.alpha),
        ]
        for module in sorted(modules, key=error, reverse=True)[:LARGEST]
    ]
    return Table(["linear", "error", "scheme", "group", "methods", "α"], rows)
