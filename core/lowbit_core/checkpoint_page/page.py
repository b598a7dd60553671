"""The page: what a checkpoint is, how close to its base, and what it took. It computes nothing new."""

import shlex

from lowbit_core.checkpoint_page.cost import size_parts, time_parts
from lowbit_core.checkpoint_page.experts import expert_parts
from lowbit_core.checkpoint_page.left_out import left_out_parts
from lowbit_core.checkpoint_page.modules import module_parts
from lowbit_core.checkpoint_page.places import short
from lowbit_core.checkpoint_page.quality import quality_parts
from lowbit_core.checkpoint_page.steps import step_parts
from lowbit_core.manifest import MANIFEST_NAME, Manifest
from lowbit_core.pages.chart import Chart
from lowbit_core.pages.html import code, heading, page, paragraph, verdict
from lowbit_core.serving import serving_commands

MOST_REASONS = 20


def as_html(manifest: Manifest, name: str, *, verified: bool = False) -> str:
    """The whole page of the checkpoint in a directory of this `name`; `verified` says that its files were hashed."""
    title = f"{short(manifest.base.name)}, quantized"
    description = manifest.recipe.get("description")
    parts: list[str | Chart] = [
        heading(title),
        *([paragraph(short(description, 500))] if isinstance(description, str) and description else []),
        paragraph(_about(manifest, verified), "quiet"),
        _verdict(manifest),
        "<h2>Quality</h2>",
        *quality_parts(manifest.quality, manifest.trial),
        *step_parts(manifest),
        "<h2>Output error by module</h2>",
        *module_parts(manifest.modules),
        *expert_parts(manifest.experts, manifest.figures),
        "<h2>Size</h2>",
        *size_parts(manifest),
        "<h2>Time</h2>",
        *time_parts(manifest.run),
        "<h2>Left out, and why</h2>",
        *left_out_parts(manifest),
        "<h2>How to serve it</h2>",
        *_serving(manifest, name),
    ]
    return page(title, parts)


def _about(manifest: Manifest, verified: bool) -> str:
    base, kv, text = manifest.base, manifest.kv_cache, manifest.calibration
    calibrated = (
        f"{text.tokens:,} calibration tokens ({short(text.dataset)})" if text else "no calibration text"
    )
    cache = "the cache is not quantized" if kv is None else f"the cache is {short(kv.dtype)}"
    if kv is not None and kv.skip_layers:
        cache += f" but for {len(kv.skip_layers)} of {len(kv.layers)} layers"
    facts = [
        short(manifest.created),
        f"{short(base.model_type)} in {short(base.dtype)}",
        f"{manifest.size.parameters:,} parameters",
        calibrated,
        cache,
        f"{len(manifest.files)} files, {'every hash verified' if verified else 'hashes not verified'}",
        *(f"{short(tool)} {short(version)}" for tool, version in list(manifest.versions.items())[:12]),
    ]
    return (
        ", ".join(facts)
        + f". All else that is known, the recipe and each linear with it, is in {MANIFEST_NAME}."
    )


def _verdict(manifest: Manifest) -> str:
    gate = manifest.gate
    limits = [f"limit: {short(name)} {limit:g}" for name, limit in list(gate.limits.items())[:MOST_REASONS]]
    if not gate.accepted:
        return verdict(
            "bad", "Rejected by its quality gate", [short(one, 300) for one in gate.reasons[:MOST_REASONS]]
        )
    if limits:
        return verdict("good", "Accepted by its quality gate", limits)
    return verdict("open", "Its recipe sets no limits of quality")


def _serving(manifest: Manifest, name: str) -> list[str]:
    directory = shlex.quote(f"./{name.encode(errors='replace').decode()}")
    rejected = "lowbit serve refuses what its gate has rejected, unless --allow-rejected is given."
    notes = [rejected] * (not manifest.gate.accepted)
    notes += [f"An export in the format {short(manifest.export.to)}."] if manifest.export else []
    return [*map(paragraph, notes), code(serving_commands(manifest, directory))]
