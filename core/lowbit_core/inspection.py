"""`lowbit inspect`: the manifest for a person, or as JSON; `--verify` hashes every file.

`--html FILE` writes all of it as a page instead (checkpoint_page/).

`--architecture MODEL` shows what quantize finds of a model: it is another package's, found by its entry point.
"""

import argparse
import json
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from lowbit_core.checkpoint_page.page import as_html
from lowbit_core.checkpoint_page.steps import step_table
from lowbit_core.cli import Command, file_path
from lowbit_core.durable import write_text
from lowbit_core.errors import CheckpointError, ConfigError, OutputError
from lowbit_core.evals.broken import MARK, broken_domains, said_of_domain
from lowbit_core.log import get_logger
from lowbit_core.manifest import (
    MANIFEST_NAME,
    DivergenceRecord,
    KVCacheRecord,
    Manifest,
    QualityRecord,
    read_manifest,
)
from lowbit_core.manifest_files import verify_files
from lowbit_core.module_groups import module_groups

log = get_logger("inspect")

ARCHITECTURE_GROUP = "lowbit.architecture"
BAR = 24  # characters of the largest KL of a step
MOST_NAMES = 4  # that are shown of linears which are not quantized


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=file_path, metavar="DIR", nargs="?")
    parser.add_argument(
        "--architecture",
        metavar="MODEL",
        help="instead: the decoder layers of a model that is not quantized, found by running a narrow twin of it",
    )
    parser.add_argument("--verify", action="store_true", help="hash every file and compare with the manifest")
    parser.add_argument("--json", action="store_true", help="print the whole manifest as JSON")
    parser.add_argument(
        "--html", metavar="FILE.html", type=file_path, help="write a page with charts instead"
    )


def _run(arguments: argparse.Namespace) -> int:
    if (arguments.checkpoint is None) == (arguments.architecture is None):
        raise ConfigError("give DIR, a checkpoint, or --architecture MODEL: one of the two")
    if arguments.html is not None:
        _check_page(arguments)
    if arguments.architecture is not None:
        return _show_architecture(arguments.architecture, as_json=arguments.json)
    manifest = read_manifest(arguments.checkpoint)
    if manifest is None:
        raise CheckpointError(
            f"{arguments.checkpoint} has no {MANIFEST_NAME}; only `lowbit quantize` writes one"
        )
    if arguments.verify:
        verify_files(arguments.checkpoint, manifest, hashes=True)
    if arguments.html is not None:
        _write_page(arguments.html, manifest, arguments.checkpoint, verified=arguments.verify)
        return 0
    if arguments.json:
        sys.stdout.write(manifest.model_dump_json(indent=2) + "\n")
        return 0
    console = Console()
    console.print(describe(manifest, verified=arguments.verify))
    console.print(domain_table(manifest))
    if manifest.steps:
        console.print(waterfall(manifest))
    return 0


def _check_page(arguments: argparse.Namespace) -> None:
    """Raises ConfigError before anything is read."""
    file, other = arguments.html, "--json" if arguments.json else "--architecture"
    if arguments.json or arguments.architecture is not None:
        raise ConfigError(f"--html writes a page about DIR and {other} prints; give one of the two")
    if os.path.lexists(file):
        raise ConfigError(f"--html {file} is there already; give the name of a new file")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--html {file} cannot be written; give a file in a directory that exists and can be written to"
        )


def _write_page(file: Path, manifest: Manifest, checkpoint: Path, *, verified: bool) -> None:
    """The whole page or nothing; raises OutputError where the disk does not take it."""
    page = as_html(manifest, checkpoint.resolve().name, verified=verified)
    try:
        with TemporaryDirectory(prefix=".lowbit-", dir=file.parent) as scratch:
            write_text(file, page, Path(scratch))
    except OSError as error:
        raise OutputError(f"--html {file}: {error.strerror or error}; give another file") from error
    log.info("report: %s", file)


def _show_architecture(model: str, *, as_json: bool) -> int:
    found = next(iter(entry_points(group=ARCHITECTURE_GROUP)), None)
    if found is None:
        raise ConfigError("--architecture runs a model, which needs `pip install lowbit[quantize]`")
    data, tables = found.load()(model)
    if as_json:
        sys.stdout.write(json.dumps(data) + "\n")
    else:
        Console().print(tables)
    return 0


def describe(manifest: Manifest, *, verified: bool) -> Table:
    """The facts of a checkpoint, one a row."""
    size, quality, gate = manifest.size, manifest.quality, manifest.gate
    kv, base = manifest.kv_cache, manifest.base
    table = Table(show_header=False, title=manifest.base.name)
    rows = {
        "base": f"{base.kind}, {base.model_type}, {base.dtype}, {size.parameters:,} parameters",
        "weights": "\n".join(map(str, module_groups(manifest))) or "not quantized",
        "bits per weight": f"{size.linear_bits_per_weight} in quantized linears",
        "left as they are": _unquantized(manifest.unquantized),
        "KV cache": _kv_cache(kv) if kv else "not quantized",
        "size": f"{size.base_bytes / 2**20:.1f} MiB to {size.bytes / 2**20:.1f} MiB",
        "mean KL": f"{quality.mean_kld:.4f} ± {quality.kld_stderr:.4f} nats on {quality.predictions:,} predictions",
        "on calibration text": _overfitting(quality),
        "on text set aside": _alone(quality.set_aside),
        "KL, 99th percentile": _with_error(quality.kld_p99, quality.kld_p99_stderr, ".3f"),
        "KL, maximum": _with_error(quality.kld_max, quality.kld_max_stderr, ".3f"),
        "FP8 cache alone": _alone(quality.kv_cache_alone),
        "noise floor": _alone(quality.noise_floor),
        "top-1 agreement": f"{quality.top1_agreement:.2%} ± {quality.top1_stderr:.2%}",
        "perplexity": f"{quality.perplexity_base:.3f} to {quality.perplexity:.3f}, ratio "
        + _with_error(quality.perplexity_ratio, quality.perplexity_ratio_stderr, ".4f"),
        "gate": ("accepted" if gate.accepted else "REJECTED: " + "; ".join(gate.reasons))
        + ("" if gate.limits else " (no limits set)"),
        "files": f"{len(manifest.files)}, {'every hash verified' if verified else 'not verified (--verify)'}",
    }
    if manifest.structure:
        rows["structure"] = str(manifest.structure)
    if manifest.unopened:
        rows["plain transformers"] = "\n".join(map(str, manifest.unopened))
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _kv_cache(kv: KVCacheRecord) -> str:
    by_head = ", a scale for each head" if kv.strategy == "attn_head" else ""
    words = f"{kv.dtype}{by_head}, {len(kv.layers) - len(kv.skip_layers)} layers, {kv.source}"
    if not kv.skip_layers:
        return words
    numbers = " ".join(map(str, kv.skip_layers))
    return f"{words}\n{len(kv.skip_layers)} in the model's type; stock vLLM: --kv-cache-dtype-skip-layers {numbers}"


def _unquantized(names: list[str]) -> str:
    if not names:
        return "no linear of the decoder"
    shown = ", ".join(names[:MOST_NAMES]) + (", …" if len(names) > MOST_NAMES else "")
    return f"{len(names)} linears: {shown}"


def _with_error(value: float, stderr: float | None, digits: str) -> str:
    """A figure and its standard error, which manifests of older versions lack."""
    return f"{value:{digits}}" if stderr is None else f"{value:{digits}} ± {stderr:{digits}}"


def _overfitting(quality: QualityRecord) -> str:
    if quality.calibration is None or quality.overfitting is None:
        return _alone(None)
    other = "held-out text" if quality.set_aside is None else "text set aside"
    return f"{_alone(quality.calibration)}; {other} loses {quality.overfitting:.2f} times as much"


def _alone(measured: DivergenceRecord | None) -> str:
    if measured is None:
        return "not measured"
    return f"mean KL {_with_error(measured.mean_kld, measured.kld_stderr, '.5f')}, top-1 {measured.top1_agreement:.2%}"


def domain_table(manifest: Manifest) -> Table:
    """Quality by domain of text."""
    table = Table("domain", "sequences", "mean KL", "99th percentile", "maximum", "top-1", "perplexity ratio")
    broken = broken_domains(manifest.quality.domains)
    if broken:
        table.caption = "; ".join(map(said_of_domain, broken))
    for name, row in manifest.quality.domains.items():
        table.add_row(
            f"{name} ({MARK})" if name in [one.name for one in broken] else name,
            f"{row['sequences']:.0f}",
            _with_error(row["mean_kld"], row.get("kld_stderr"), ".4f"),
            _with_error(row["kld_p99"], row.get("kld_p99_stderr"), ".3f") if "kld_p99" in row else "",
            _with_error(row["kld_max"], row.get("kld_max_stderr"), ".3f") if "kld_max" in row else "",
            _with_error(row["top1_agreement"], row.get("top1_stderr"), ".2%"),
            _with_error(
                row["perplexity"] / row["perplexity_base"], row.get("perplexity_ratio_stderr"), ".4f"
            ),
        )
    return table


def waterfall(manifest: Manifest) -> Table:
    """The steps that made it: KL and bytes after each, and a bar of the KL."""
    found = step_table(manifest.steps)
    table = Table(*found.columns, "")
    largest = max(one.mean_kld for one in manifest.steps) or 1.0
    for row, step in zip(found.rows, manifest.steps, strict=True):
        table.add_row(*row, "█" * max(1, round(BAR * max(0.0, step.mean_kld) / largest)))
    return table


command = Command("Show what a checkpoint is and how close it is to its base.", _add_arguments, _run)
