"""Sensitivities for people: tables, and a page with a line for each kind of decision over the layers."""

from collections.abc import Sequence
from html import escape

from lowbit_core.pages.chart import Chart, Mark, Series, Table, lines
from lowbit_core.pages.html import heading, page, paragraph, wide
from lowbit_quantize.recipe import NONE
from lowbit_quantize.sensitivity.assignment import uniform
from lowbit_quantize.sensitivity.report import CACHE, DecisionRecord, Sensitivity

KL = "predicted KL (nats a token)"
LARGEST = 12


def as_html(found: Sensitivity) -> str:
    """The whole page."""
    title = f"{found.base.name}: what each scheme is predicted to cost"
    parts: list[str | Chart] = [
        heading(escape(title)),
        paragraph(
            f"Each decision by itself, felt on {found.scored.tokens:,} tokens that its candidates were not made on "
            f"({found.calibration.tokens:,} others), in {found.run.cpu_seconds:.0f} CPU seconds. The sum over "
            "decisions predicts the KL divergence of a checkpoint.",
            "quiet",
        ),
        "<h2>Everywhere the same</h2>",
        wide(uniform_table(found)),
        "<h2>By kind</h2>",
        wide(kind_table(found)),
    ]
    parts += [
        "<h2>By layer</h2>",
        *_charts(found),
        f"<h2>The {LARGEST} largest</h2>",
        wide(largest_table(found)),
    ]
    return page(title, parts)


def uniform_table(found: Sensitivity) -> Table:
    """A row for each candidate: its checkpoint, if every decision but the head's takes it."""
    rows = []
    for candidate in _quantized(found):
        try:
            one = uniform(found, candidate)
            rows.append([candidate, f"{one.bits:.3g}", f"{one.bytes / 1e6:,.1f}", f"{one.kl:.4g}"])
        except KeyError:  # a decision that cannot have it
            continue
    return Table(["candidate", "bits", "MB", KL], rows)


def kind_table(found: Sensitivity) -> Table:
    """Sums over layers, by kind and candidate; a cache has a column of its own."""
    names = list(dict.fromkeys(name for one in found.decisions for name in one.choices if name != NONE))
    kinds = list(dict.fromkeys(one.kind for one in found.decisions))
    rows = []
    for kind in kinds:
        some = [one for one in found.decisions if one.kind == kind]
        sums = [sum(one.choices[name].kl for one in some if name in one.choices) for name in names]
        there = [any(name in one.choices for one in some) for name in names]
        cells = [f"{total:.3g}" if known else "–" for total, known in zip(sums, there, strict=True)]
        rows.append([kind, str(len(some)), *cells])
    return Table(["kind", "decisions", *names], rows)


def largest_table(found: Sensitivity) -> Table:
    """The decisions that the first candidate costs most."""
    first = _quantized(found)[0]
    some = [one for one in found.decisions if first in one.choices]
    some.sort(key=lambda one: -one.choices[first].kl)
    rows = [
        [one.name, f"{one.weights:,}", f"{one.choices[first].kl:.3g} ± {one.choices[first].kl_stderr:.1g}"]
        for one in some[:LARGEST]
    ]
    return Table(["decision", "weights", f"{first}, nats a token"], rows)


def _charts(found: Sensitivity) -> list[Chart]:
    charts = [_chart(found.decisions, name, name) for name in _quantized(found)]
    cached = [one for one in found.decisions if one.kind == CACHE]
    if cached:
        charts.append(_chart(cached, next(iter(cached[0].choices)), "keys and values in FP8"))
    return charts


def _chart(decisions: Sequence[DecisionRecord], candidate: str, title: str) -> Chart:
    by_kind: dict[str, list[Mark]] = {}
    for one in decisions:
        choice = one.choices.get(candidate)
        if choice is not None and one.layer is not None:
            low, high = choice.kl - choice.kl_stderr, choice.kl + choice.kl_stderr
            by_kind.setdefault(one.kind, []).append(Mark(one.layer, choice.kl, low, high))
    series = [Series(kind, marks) for kind, marks in by_kind.items()]
    return lines(title, "layer", KL, series, note="bars are one standard error", log=True)


def _quantized(found: Sensitivity) -> list[str]:
    return [one.name for one in found.candidates if one.scheme != NONE]
