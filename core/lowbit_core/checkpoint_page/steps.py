"""The steps that made a checkpoint, as waterfalls: what each cost in bytes and in KL, and what it won back."""

from collections.abc import Sequence
from dataclasses import replace

from lowbit_core.checkpoint_page.places import short
from lowbit_core.checkpoint_page.spread import number
from lowbit_core.manifest import Manifest, StepRecord
from lowbit_core.pages.chart import COLORS, GREY, Chart, Table
from lowbit_core.pages.html import paragraph
from lowbit_core.pages.plots import Bar, stacked_bars

MIB = 1 << 20
MOST_STEPS = 24
KEPT, ADDED, TAKEN = "as before", "added", "taken away"
SHADES = {KEPT: GREY, ADDED: COLORS[1], TAKEN: COLORS[2]}


def step_parts(manifest: Manifest) -> list[str | Chart]:
    """Two waterfalls and their table; nothing of a checkpoint that one run has made."""
    steps = manifest.steps[:MOST_STEPS]
    if not steps:
        return []
    names = [f"{place}. {short(one.step)}" for place, one in enumerate(steps, 1)]
    kl = waterfall("mean KL after each step", names, [one.mean_kld for one in steps], 0.0, "nats")
    sizes = [one.bytes / MIB for one in steps]
    size = waterfall("bytes after each step", names, sizes, manifest.size.base_bytes / MIB, "MiB")
    gained = _gained(steps)
    return [
        "<h2>Steps</h2>",
        paragraph(f"{len(manifest.steps)} steps made this checkpoint.{gained}"),
        replace(kl, table=step_table(steps)),
        size,
    ]


def waterfall(title: str, names: Sequence[str], values: Sequence[float], start: float, unit: str) -> Chart:
    """A bar for each step: what stays of the value before it, what it adds and what it takes away."""
    bars = []
    for name, before, after in zip(names, [start, *values], values, strict=False):
        parts = {KEPT: min(before, after), ADDED: max(0.0, after - before), TAKEN: max(0.0, before - after)}
        bars.append(Bar(name, parts, f"{after:.4g} {unit}"))
    return stacked_bars(title, bars, SHADES, unit)


def step_table(steps: Sequence[StepRecord]) -> Table:
    """Each step's cost and gain, in words."""
    rows = [
        [
            f"{place}. {short(one.step)}",
            short(one.what),
            f"{one.mean_kld:.4f} ± {one.kld_stderr:.4f}",
            f"{one.mean_kld - before:+.4f}",
            f"{one.bytes / MIB:,.1f}",
            number(one.changed_bytes, ",d"),
            f"{one.seconds:,.0f}",
            f"{one.cpu_seconds:,.0f}",
        ]
        for place, (before, one) in enumerate(
            zip([0.0, *(s.mean_kld for s in steps)], steps, strict=False), 1
        )
    ]
    return Table(["step", "what", "mean KL", "change", "MiB", "bytes that changed", "s", "CPU s"], rows)


def _gained(steps: Sequence[StepRecord]) -> str:
    """What the last step that trained won back, in a sentence."""
    last = next((one for one in reversed(steps) if one.kld_before and one.trained_parameters), None)
    if last is None or not last.kld_before:
        return ""
    share = 1 - last.mean_kld / last.kld_before
    word = "won back" if share >= 0 else "lost another"
    return f" The last that trained {word} {abs(share):.0%} of the KL that it found."
