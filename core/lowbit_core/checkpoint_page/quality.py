"""How close the checkpoint is to its base: the figures with their errors, whole, by domain and by themselves."""

import math
from collections.abc import Collection, Mapping

from lowbit_core.checkpoint_page.places import short
from lowbit_core.evals.arithmetic import Estimate
from lowbit_core.evals.broken import MARK, broken_domains, said_of_domain
from lowbit_core.manifest import DivergenceRecord, QualityRecord, TrialRecord
from lowbit_core.pages.chart import COLORS, GREY, Chart, Table
from lowbit_core.pages.html import paragraph, wide
from lowbit_core.pages.plots import Member, intervals

MOST_DOMAINS = 40
WHOLE = "all held-out text"
ALONE = {
    "noise_floor": "base model, serving dtype",
    "kv_cache_alone": "FP8 cache alone",
    "calibration": "on its calibration text",
    "set_aside": "on what was set aside of that text",
}
# Column or chart, the field, that of its error, how it is written.
FIGURES = (
    ("mean KL, nats", "mean_kld", "kld_stderr", "{:.4f}"),
    ("KL, 99th percentile", "kld_p99", "kld_p99_stderr", "{:.3f}"),
    ("KL, maximum", "kld_max", "kld_max_stderr", "{:.3f}"),
    ("top-1 agreement", "top1_agreement", "top1_stderr", "{:.2%}"),
    ("perplexity ratio", "perplexity_ratio", "perplexity_ratio_stderr", "{:.4f}"),
)
DRAWN = {"mean_kld": "KL to the base", "top1_agreement": "top-1 agreement with the base"} | {
    "perplexity_ratio": "perplexity, of the base's"
}

Row = Mapping[str, float | None]


def quality_parts(quality: QualityRecord, trial: TrialRecord | None) -> list[str | Chart]:
    """A table of all figures and a chart of each that is a mean; a sentence where nothing was measured."""
    if not quality.predictions or not math.isfinite(quality.mean_kld):
        return [paragraph("Quality was not measured.", "warning")]
    heldout = quality.heldout
    about = (
        f"{quality.predictions:,} predictions of {heldout.num_samples} held-out sequences ({short(heldout.dataset)}), "
        f"{'with' if quality.kv_cache_included else 'without'} the FP8 cache. Brackets and bars are ± one standard "
        "error over sequences."
    )
    rows, broken = _rows(quality), broken_domains(quality.domains)
    left = len(quality.domains) - MOST_DOMAINS
    return [
        paragraph(about, "quiet"),
        *([paragraph(f"{left} domains with a lower KL are not shown.", "quiet")] if left > 0 else []),
        *([paragraph(_trial(trial))] if trial else []),
        *(paragraph(short(said_of_domain(one)), "warning") for one in broken),
        wide(_table(rows, [short(one.name) for one in broken])),
        *(_chart(rows, title, *figure) for figure in FIGURES if (title := DRAWN.get(figure[1]))),
    ]


def _rows(quality: QualityRecord) -> dict[str, Row]:
    """What is compared with the base, and its figures; domains by falling KL, the checkpoint first."""
    worst = sorted(quality.domains.items(), key=lambda one: -one[1].get("mean_kld", 0.0))[:MOST_DOMAINS]
    rows: dict[str, Row] = {WHOLE: {**_of(quality), "sequences": quality.heldout.num_samples}}
    rows |= {short(name): _with_ratio(figures) for name, figures in worst}
    return rows | {name: _of(one) for field, name in ALONE.items() if (one := getattr(quality, field))}


def _of(one: QualityRecord | DivergenceRecord) -> Row:
    fields = [field for _, value, stderr, _ in FIGURES for field in (value, stderr)]
    return {field: getattr(one, field) for field in fields} | {"sequences": getattr(one, "sequences", None)}


def _with_ratio(figures: Mapping[str, float]) -> Row:
    """Older manifests have both perplexities of a domain and not their ratio."""
    base = figures.get("perplexity_base")
    return {"perplexity_ratio": figures.get("perplexity", 0.0) / base, **figures} if base else figures


def _estimate(row: Row, value: str, stderr: str) -> Estimate | None:
    known, error = row.get(value), row.get(stderr)
    if known is None or not math.isfinite(known):
        return None
    if error is None or not math.isfinite(error):
        return Estimate(known, None, None)
    return Estimate(known, known - error, known + error)


def _table(rows: Mapping[str, Row], broken: Collection[str]) -> Table:
    cells = [
        [
            f"{name} ({MARK})" if name in broken else name,
            f"{row.get('sequences') or 0:.0f}",
            *(_cell(row, *figure) for figure in FIGURES),
        ]
        for name, row in rows.items()
    ]
    return Table(["", "sequences", *(name for name, *_ in FIGURES)], cells)


def _cell(row: Row, _: str, value: str, stderr: str, form: str) -> str:
    one = _estimate(row, value, stderr)
    if one is None:
        return "–"
    error = row.get(stderr)
    return form.format(one.value) + ("" if one.low is None or error is None else f" [± {form.format(error)}]")


def _chart(rows: Mapping[str, Row], title: str, name: str, value: str, stderr: str, form: str) -> Chart:
    groups = {
        row: [Member("", GREY if row in ALONE.values() else COLORS[0], one)]
        for row, figures in rows.items()
        if (one := _estimate(figures, value, stderr))
    }
    zero = 1.0 if value == "perplexity_ratio" else None
    return intervals(title, groups, name, form, zero)


def _trial(trial: TrialRecord) -> str:
    kept = "is kept" if trial.kept else "is not kept"
    return (
        f"{short(', '.join(trial.passes))} was on trial and {kept}: mean KL {trial.kld_with:.4f} with it, "
        f"{trial.kld_without:.4f} without."
    )
