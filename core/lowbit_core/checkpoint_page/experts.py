"""Routed experts: how many stay and which, how much they mattered, and how much text each of them has seen."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from lowbit_core.checkpoint_page.places import few_layers, layers_note, short
from lowbit_core.checkpoint_page.spread import marks
from lowbit_core.manifest import ExpertsRecord, UnderCalibratedExpert
from lowbit_core.pages.chart import COLORS, GREY, Chart, Mark, Series, Table, lines
from lowbit_core.pages.html import paragraph

MOST_FIGURES = 6  # that passes measured, a chart each
MOST_LETTERS = 1000  # of the numbers of a layer's experts

ByLayer = Mapping[int, Sequence[float]]


def expert_parts(
    experts: ExpertsRecord | None, figures: Mapping[int, Mapping[str, float]]
) -> list[str | Chart]:
    """Nothing of a dense model on which no pass has measured anything."""
    measured = _figures(figures)
    if experts is None:
        return ["<h2>Measured by passes</h2>", *measured] if measured else []
    return [
        "<h2>Experts</h2>",
        paragraph(_summary(experts)),
        *_saliency(experts),
        *_coverage(experts),
        *_under_calibrated(experts.under_calibrated),
        *_kept(experts),
        *measured,
    ]


def _summary(experts: ExpertsRecord) -> str:
    if experts.kept == experts.experts:
        return f"{experts.experts} routed experts in each layer, all of which stay."
    how = "dropped"
    if experts.consolidate:
        how = f"merged into those that stay ({experts.consolidate}, nearest by {experts.similarity})"
    return (
        f"{experts.kept} of {experts.experts} routed experts of each layer stay, chosen by {experts.criterion}; "
        f"the others are {how}."
    )


def _saliency(experts: ExpertsRecord) -> list[Chart]:
    if not experts.saliency_by_layer:
        return []
    title, name = "expert saliency by layer", f"score by {experts.criterion}"
    return [_stay_and_go(title, name, experts.saliency_by_layer, experts.kept_by_layer)]


def _coverage(experts: ExpertsRecord) -> list[Chart]:
    """How many tokens of the calibration text each expert of the base was given."""
    if not experts.tokens_by_layer:
        return []
    title, name = "coverage: calibration tokens by expert", "tokens of an expert"
    return [_stay_and_go(title, name, experts.tokens_by_layer, experts.kept_by_layer)]


def _stay_and_go(title: str, name: str, values: ByLayer, kept: Mapping[int, Sequence[int]]) -> Chart:
    """The mean of the experts that stay and of those that go, each from its smallest to its largest."""
    stay = {layer: _at(values[layer], kept.get(layer, ())) for layer in values}
    go = {
        layer: _at(values[layer], sorted(set(range(len(values[layer]))) - set(kept.get(layer, ()))))
        for layer in values
    }
    note = "; ".join(
        ["from the smallest to the largest of a layer", *filter(None, [layers_note(len(values))])]
    )
    series = [
        Series("stay", marks(few_layers(stay)), COLORS[0]),
        Series("go", marks(few_layers(go)), COLORS[1]),
    ]
    return lines(title, "layer", name, series, note=note, log=True)


def _at(values: Sequence[float], places: Iterable[int]) -> list[float]:
    return [values[place] for place in places if 0 <= place < len(values)]


def _under_calibrated(found: Sequence[UnderCalibratedExpert]) -> list[str | Chart]:
    if not found:
        return []
    counts: Counter[int] = Counter(one.layer for one in found)
    by_layer = few_layers({layer: [float(count)] for layer, count in counts.items()})
    series = [Series("experts", [Mark(layer, sum(some)) for layer, some in by_layer.items()], GREY)]
    note = "; ".join(
        [
            f"{len(found):,} experts saw fewer calibration tokens than their linears have inputs, the fewest "
            f"{min(one.tokens for one in found)}; they borrowed statistics from their layer",
            *filter(None, [layers_note(len(counts))]),
        ]
    )
    return [lines("under-calibrated experts by layer", "layer", "experts", series, note=note)]


def _kept(experts: ExpertsRecord) -> list[str | Chart]:
    """Which stay, in the base model's numbers; all layers that there is room for."""
    if not experts.kept_by_layer or experts.kept == experts.experts:
        return []
    rows = []
    for layer in sorted(experts.kept_by_layer)[: MOST_LETTERS // 5]:
        absorbed = Counter(experts.absorbed_by_layer.get(layer, {}).values())
        merged = ", ".join(f"{number} (+{count})" for number, count in sorted(absorbed.items())) or "–"
        rows.append([str(layer), short(_ranges(experts.kept_by_layer[layer]), MOST_LETTERS)])
        rows[-1] += [short(merged, MOST_LETTERS)] if experts.absorbed_by_layer else []
    columns = ["layer", "experts that stay", *(["absorbed"] if experts.absorbed_by_layer else [])]
    note = "the base model's numbers; expert i of the checkpoint is entry i"
    return [Chart("which experts stay", None, Table(columns, rows), note)]


def _ranges(numbers: Sequence[int]) -> str:
    """`0–3, 5`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}–{last}" for first, last in runs)


def _figures(figures: Mapping[int, Mapping[str, float]]) -> list[str | Chart]:
    """A chart for each name of what passes measured of layers."""
    names = list(dict.fromkeys(name for by_name in figures.values() for name in by_name))[:MOST_FIGURES]
    return [
        lines(
            f"measured by a pass: {short(name)}",
            "layer",
            short(name),
            [
                Series(
                    short(name),
                    marks(few_layers({at: [one[name]] for at, one in figures.items() if name in one})),
                )
            ],
            note=layers_note(len(figures)),
        )
        for name in names
    ]
