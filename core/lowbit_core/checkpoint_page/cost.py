"""What the checkpoint weighs, by scheme, and where the run's time went."""

from collections.abc import Sequence
from dataclasses import replace

from lowbit_core.checkpoint_page.places import short
from lowbit_core.checkpoint_page.spread import number
from lowbit_core.manifest import Manifest, RunRecord
from lowbit_core.module_groups import ModuleGroup, module_groups
from lowbit_core.pages.chart import COLORS, GREY, Chart, Table
from lowbit_core.pages.html import paragraph
from lowbit_core.pages.plots import Bar, stacked_bars

MIB = 1 << 20
MOST_GROUPS = len(COLORS)  # that a bar tells apart
MOST_PHASES = 40
REST, LINEARS, OTHERS = "not quantized", "quantized linears", "other schemes"


def size_parts(manifest: Manifest) -> list[str | Chart]:
    """Bytes of the base and of the checkpoint, its linears by scheme."""
    size, groups = manifest.size, module_groups(manifest)
    smaller = f", {size.base_bytes / size.bytes:.2f} times smaller" if size.bytes else ""
    sentence = (
        f"{_mib(size.base_bytes)} MiB of tensors became {_mib(size.bytes)} MiB{smaller}. "
        f"{size.quantized_parameters:,} of {size.parameters:,} parameters are quantized, at "
        f"{size.linear_bits_per_weight:.4g} bits per weight with scales and zero points."
    )
    known = {_name(group): group.stored_bytes / MIB for group in groups[:MOST_GROUPS] if group.stored_bytes}
    parts = known if len(known) == len(groups) else {LINEARS: _linear_bytes(manifest) / MIB}
    rest = size.bytes / MIB - sum(parts.values())
    colors = {name: COLORS[place] for place, name in enumerate(parts)} | {REST: GREY}
    bars = [
        Bar("base", {REST: size.base_bytes / MIB}, f"{_mib(size.base_bytes)} MiB"),
        Bar("checkpoint", parts | {REST: max(0.0, rest)}, f"{_mib(size.bytes)} MiB"),
    ]
    chart = stacked_bars("bytes of tensors", bars, colors, "MiB")
    return [paragraph(sentence), replace(chart, table=_table(manifest, groups))]


def _linear_bytes(manifest: Manifest) -> float:
    """By the mean bits per weight, where a manifest does not have every linear's bytes."""
    return manifest.size.linear_bits_per_weight * manifest.size.quantized_parameters / 8


def _name(group: ModuleGroup) -> str:
    size = "channel" if group.group_size is None else str(group.group_size)
    sparse = f", {group.sparse}" if group.sparse else ""
    return short(f"{group.scheme}, {size}, {'+'.join(group.methods)}{sparse}")


def _table(manifest: Manifest, groups: Sequence[ModuleGroup]) -> Table:
    size = manifest.size
    rows = [
        [
            _name(group),
            str(group.linears),
            number(group.weights, ",d"),
            number(group.stored_bytes and group.stored_bytes / MIB, ".1f"),
            number(group.bits_per_weight, ".4g"),
        ]
        for group in groups[: 4 * MOST_GROUPS]
    ]
    rows += [
        ["quantized linears", str(len(manifest.modules)), f"{size.quantized_parameters:,}"]
        + [f"{_linear_bytes(manifest) / MIB:.1f}", f"{size.linear_bits_per_weight:.4g}"],
        ["checkpoint", "", f"{size.parameters:,}", _mib(size.bytes), ""],
        ["base", "", f"{size.parameters:,}", _mib(size.base_bytes), ""],
    ]
    return Table(["scheme, group, methods", "linears", "parameters", "MiB", "bits"], rows)


def _mib(count: float) -> str:
    return f"{count / MIB:,.1f}"


def time_parts(run: RunRecord) -> list[str | Chart]:
    """A bar for each phase; the sum alone of a manifest that has no phases."""
    busy = run.cpu_seconds / run.seconds if run.seconds > 0 else 0.0
    sentence = (
        f"{run.seconds:,.1f} s on {short(run.device)}, {run.cpu_seconds:,.1f} CPU s ({busy:.2g} CPUs busy), "
        f"peak memory {run.peak_rss_bytes / (1 << 30):.2f} GiB; of the process that finished the run."
    )
    if not run.phases_s:
        return [paragraph(sentence), paragraph("Its manifest has no time by phase.", "quiet")]
    total = sum(run.phases_s.values()) or 1.0
    took = [(short(name), seconds) for name, seconds in run.phases_s.items() if seconds > 0]
    phases = dict(took[:MOST_PHASES])
    bars = [Bar(name, {"s": seconds}, f"{seconds:,.1f} s") for name, seconds in phases.items()]
    rows = [[name, f"{seconds:,.1f}", f"{seconds / total:.1%}"] for name, seconds in phases.items()]
    chart = stacked_bars("time by phase", bars, {"s": COLORS[0]}, "s")
    return [paragraph(sentence), replace(chart, table=Table(["phase", "s", "of all"], rows))]
