"""`lowbit quantize`: flags in, one JSON object out as the last line of stdout."""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit_core.cli import Command, RenamedFlag, file_path
from lowbit_core.errors import ConfigError, QualityError
from lowbit_core.log import get_logger
from lowbit_core.manifest import Manifest
from lowbit_quantize.recipe import Recipe, bundled_recipes, load_recipe
from lowbit_quantize.run.launch import LAUNCHED, LOST, end_with_launcher, launch

if TYPE_CHECKING:
    import torch

GPU_MEMORY_GIB = 74.5  # what 80 GB are
DTYPES = ("auto", "bfloat16", "float16")
RENAMED_FLAGS = {"--check": "--dry-run", "--fresh": "--overwrite", "--gpu-gib": "--gpu-memory-gib"}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(bundled_recipes())
    _add_base_arguments(parser)
    parser.add_argument("--recipe", required=True, help=f"FILE.yaml or one of: {names}")
    parser.add_argument("--out", type=file_path, help="directory for the checkpoint, new or empty")
    _add_report_arguments(parser)
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start over: remove what --out holds of an earlier run of this command",
    )
    parser.add_argument(
        "--stream-memory-gib",
        type=float,
        default=4.0,
        metavar="N",
        help="hidden states beyond this go to files in --out (default 4); it changes no result",
    )
    for old, now in RENAMED_FLAGS.items():
        parser.add_argument(old, action=RenamedFlag, now=now)
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        metavar="N",
        help="make the checkpoint by N processes on this machine, one for each GPU; it changes no byte of it",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--calibration",
        metavar="SOURCE",
        help="text: default, a file, a folder, or hub:NAME[:CONFIG][:SPLIT] (docs/texts.md)",
    )
    parser.add_argument(
        "--heldout", metavar="SOURCE", help="text that quality is measured on, as --calibration"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key"
    )


def _add_base_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and how it is read."""
    parser.add_argument(
        "--model", required=True, help="directory, FILE.gguf, hub id OWNER/NAME[@REVISION] or its page"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run a tokenizer that is code of the model's own; the model itself is always transformers'",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="what the base computes in (default auto: its configuration's)"
    )
    parser.add_argument(
        "--leave-out",
        action="append",
        metavar="PATTERN",
        help="tensors of the base's files that its model does not use and that are not to be carried over",
    )


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """What ends without a checkpoint."""
    parser.add_argument(
        "--experts-report",
        type=file_path,
        nargs="?",
        const=Path("experts-report.json"),
        metavar="FILE",
        help="write no checkpoint: compare all criteria for pruning experts (default FILE: experts-report.json)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run nothing: say what engines will take, sizes on disk, memory of the run and of serving",
    )
    parser.add_argument(
        "--gpu-memory-gib",
        type=float,
        metavar="N",
        help="with --dry-run: memory of each GPU (default 74.5, an 80 GB one)",
    )


def _run(arguments: argparse.Namespace) -> int:
    _check_flags(arguments)
    recipe = load_recipe(arguments.recipe, _overrides(arguments))
    if arguments.ranks > 1 and LAUNCHED not in os.environ:
        flags = sys.argv[2 if sys.argv[1:2] == ["quantize"] else 1 :]
        return launch("quantize", flags, arguments.ranks)
    end_with_launcher()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads: idle threads sleep, not spin
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars are for terminals
    device = _device(arguments.device)
    if arguments.dry_run:
        gpu_memory_gib = arguments.gpu_memory_gib or GPU_MEMORY_GIB
        return _dry_run(arguments, recipe, gpu_memory_gib)
    if arguments.experts_report is not None:
        return _report(arguments, recipe, device)
    from lowbit_quantize.device import ranks

    try:
        manifest = _quantized(arguments, recipe, device)
    except ranks.RankLost:
        if LAUNCHED not in os.environ:
            raise
        return LOST  # whoever started this rank says why
    if manifest is None:
        return 0
    sys.stdout.write(json.dumps(summary(manifest, arguments.out)) + "\n")
    if not manifest.gate.accepted:
        sys.stderr.write(f"lowbit: rejected by its quality gate: {'; '.join(manifest.gate.reasons)}\n")
        return QualityError.exit_status
    return 0


def _overrides(arguments: argparse.Namespace) -> tuple[str, ...]:
    """What flags set of the recipe."""
    found = list(arguments.set)
    if arguments.dtype is not None:
        found.append(f"base.dtype={arguments.dtype}")
    if arguments.leave_out is not None:
        found.append(f"base.leave_out={json.dumps(arguments.leave_out)}")
    if arguments.calibration is not None:
        found.append(f"calibration.dataset={json.dumps(arguments.calibration)}")
    if arguments.heldout is not None:
        found.append(f"quality.dataset={json.dumps(arguments.heldout)}")
    return tuple(found)


def _quantized(arguments: argparse.Namespace, recipe: Recipe, device: "torch.device") -> Manifest | None:
    """The run, by this process or with the other ranks, of which the first says what came of it."""
    from lowbit_quantize.device import ranks
    from lowbit_quantize.pipeline import quantize

    with ranks.joined():
        first = ranks.is_first()
        if not first:
            get_logger("quantize").setLevel("ERROR")
        manifest = quantize(
            arguments.model,
            recipe,
            arguments.out,
            ranks.own_device(device),
            overwrite=arguments.overwrite,
            stream_memory_bytes=_stream_memory_bytes(arguments),
            trust_remote_code=arguments.trust_remote_code,
        )
    return manifest if first else None


def _check_flags(arguments: argparse.Namespace) -> None:
    if not arguments.dry_run and (arguments.out is None) == (arguments.experts_report is None):
        raise ConfigError(
            "give --out DIR for a checkpoint, --experts-report for a report, or --dry-run, one of them"
        )
    if arguments.dry_run and arguments.experts_report is not None:
        raise ConfigError("--dry-run and --experts-report are two reports; give one of them")
    if arguments.gpu_memory_gib is not None and not (arguments.dry_run and arguments.gpu_memory_gib > 0):
        raise ConfigError("--gpu-memory-gib N is a positive number that goes with --dry-run")
    if arguments.ranks > 1 and LAUNCHED not in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--ranks beside torchrun: it has started the ranks; leave out --ranks")
    if arguments.ranks < 1 or (arguments.ranks > 1 and arguments.out is None):
        raise ConfigError(f"--ranks {arguments.ranks}: allowed is 1 or more, with --out")
    if arguments.stream_memory_gib < 0:
        raise ConfigError(f"--stream-memory-gib {arguments.stream_memory_gib}: allowed is 0 or more")


def _stream_memory_bytes(arguments: argparse.Namespace) -> int:
    return int(arguments.stream_memory_gib * 2**30)


def _dry_run(arguments: argparse.Namespace, recipe: Recipe, gpu_memory_gib: float) -> int:
    from rich.console import Console

    from lowbit_quantize.check.preflight import dry_run, table

    report = dry_run(
        arguments.model,
        recipe,
        gpu_memory_gib,
        _stream_memory_bytes(arguments),
        arguments.out,
        trust_remote_code=arguments.trust_remote_code,
    )
    Console(file=sys.stderr).print(table(report))
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


def _report(arguments: argparse.Namespace, recipe: Recipe, device: "torch.device") -> int:
    from lowbit_quantize.check.expert_report import report_experts, table

    file = arguments.experts_report
    report = report_experts(
        arguments.model, recipe, file, device, trust_remote_code=arguments.trust_remote_code
    )
    sys.stderr.write(table(report) + "\n")
    found = {
        "report": str(file),
        **{key: report[key] for key in ("mean_error", "least_error", "merging_error")},
    }
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


def _device(name: str) -> "torch.device":
    try:
        from lowbit_quantize.device.chosen import chosen_device
    except ImportError:
        raise ConfigError(
            "`lowbit quantize` needs torch and transformers; run `pip install 'lowbit[cpu]'` or [gpu]"
        ) from None
    return chosen_device(name)


def summary(manifest: Manifest, out: Path) -> dict[str, Any]:
    """The result of a run in one flat object."""
    quality = manifest.quality
    measured = quality.model_dump(
        exclude={
            "heldout",
            "domains",
            "kv_cache_included",
            *(alone := ("noise_floor", "kv_cache_alone", "calibration", "set_aside")),
        }
    )
    for name in alone:
        if beside := getattr(quality, name):
            measured.update({f"{name}_kld": beside.mean_kld, f"{name}_kld_stderr": beside.kld_stderr})
    return {
        "checkpoint": str(out),
        "accepted": manifest.gate.accepted,
        **manifest.size.model_dump(include={"base_bytes", "bytes", "linear_bits_per_weight"}),
        **manifest.run.model_dump(include={"seconds", "cpu_seconds", "peak_rss_bytes"}),
        **{
            name: value if value is not None and math.isfinite(value) else None
            for name, value in measured.items()
        },
    }


command = Command("Compress a model and prove how close it stayed to its base.", _add_arguments, _run)
