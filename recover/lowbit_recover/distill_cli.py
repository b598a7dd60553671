"""`lowbit distill`: a checkpoint is taught by its base; the last line of stdout is JSON."""

import argparse
import json
import os
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lowbit_core.cli import Command, file_path
from lowbit_core.errors import ConfigError, QualityError
from lowbit_core.log import get_logger
from lowbit_quantize.run.launch import LAUNCHED, LOST, end_with_launcher, launch
from lowbit_recover.distill.settings import LEARNING_RATES, TRAINS, Settings

if TYPE_CHECKING:
    import torch

    from lowbit_core.manifest import Manifest
    from lowbit_recover.distill.distill import Task

DEFAULTS = {one.name: one.default for one in fields(Settings)}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="directory that lowbit quantize wrote")
    parser.add_argument("--base", required=True, metavar="MODEL", help="that teaches: as --model of quantize")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="SOURCE",
        help="text to train on, any: file, folder, hub:NAME[:CONFIG][:SPLIT], default (docs/texts.md), or IDS.json",
    )
    parser.add_argument("--out", type=file_path, metavar="DIR", help="directory for the result, new or empty")
    parser.add_argument(
        "--train",
        choices=TRAINS,
        default="scales",
        help="scales and norms, codes stay (default); or all weights under the checkpoint's own rounding",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        metavar="N",
        help="processes that share the work; each has the whole model",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="train nothing: say what it takes in memory and on disk"
    )
    parser.add_argument("--overwrite", action="store_true", help="begin anew in DIR")
    parser.add_argument(
        "--teacher",
        type=file_path,
        metavar="DIR",
        help="keep what the base says of the text here, and use it",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="as of lowbit quantize")
    _add_settings(parser)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    loss = parser.add_argument_group("loss")
    _number(loss, "temperature", float, "of teacher and student")
    _number(loss, "alpha", float, "weight of the text itself: 0 the base alone, 1 the text alone")
    _number(loss, "hidden", float, "weight of the last hidden states' error")
    _number(
        loss, "top_k", int, "words of the base that are kept of each position, and the mass of all others"
    )
    text = parser.add_argument_group("text and steps")
    _number(text, "tokens", int, "that train at most")
    _number(text, "row_tokens", int, "in a row")
    _number(text, "batch", int, "rows in a step")
    _number(text, "micro_batch", int, "rows at a time, of a step")
    _number(text, "epochs", int, "times through the text")
    _number(text, "set_aside", int, "rows of the text that judge and do not train")
    _number(text, "evaluate_every", int, "steps between judgements, after each of which the state is saved")
    _number(text, "patience", int, "judgements without a better one that end it")
    _number(text, "seed", int, "of the order of the text")
    how = parser.add_argument_group("how")
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
    how.add_argument(
        "--learning-rate",
        type=float,
        metavar="N",
        help=f"a step's share of a tensor's root mean square ({rates})",
    )
    _number(how, "warmup", float, "share of the steps in which the learning rate rises")
    how.add_argument(
        "--precision", choices=("bf16", "float32"), default="bf16", help="of products; weights are float32"
    )
    how.add_argument(
        "--no-checkpointing",
        dest="checkpointing",
        action="store_false",
        help="keep what layers compute: faster, more memory",
    )
    how.add_argument(
        "--optimizer-on-disk",
        action="store_true",
        help="keep AdamW's moments in files that are mapped, on the CPU",
    )


def _number(group: Any, name: str, kind: type, what: str) -> None:
    flag, default = f"--{name.replace('_', '-')}", DEFAULTS[name]
    group.add_argument(flag, type=kind, default=default, metavar="N", help=f"{what} ({default:g})")


def _run(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    if (arguments.out is None) != arguments.dry_run:
        raise ConfigError("give --out DIR for a checkpoint, or --dry-run: one of the two")
    _check_ranks(arguments)
    if arguments.ranks > 1 and LAUNCHED not in os.environ:
        return launch("distill", sys.argv[2:], arguments.ranks)
    end_with_launcher()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads: idle threads sleep, not spin
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        from lowbit_quantize.device.chosen import chosen_device
    except ImportError:
        raise ConfigError(
            "`lowbit distill` needs torch and transformers; run `pip install 'lowbit[cpu]'` or [gpu]"
        ) from None
    from lowbit_quantize.device import ranks

    device = chosen_device(arguments.device)
    if arguments.optimizer_on_disk and device.type != "cpu" and not arguments.dry_run:
        raise ConfigError("--optimizer-on-disk goes with --device cpu; a GPU cannot map files")
    try:
        with ranks.joined():
            first = ranks.is_first()
            manifest = _trained(arguments, settings, ranks.own_device(device))
    except ranks.RankLost:
        if LAUNCHED not in os.environ:
            raise
        return LOST  # whoever started this rank says why
    if manifest is None or not first:
        return 0
    sys.stdout.write(json.dumps(summary(manifest, str(arguments.out))) + "\n")
    if not manifest.gate.accepted:
        sys.stderr.write(f"lowbit: rejected by its quality gate: {'; '.join(manifest.gate.reasons)}\n")
        return QualityError.exit_status
    return 0


def _check_ranks(arguments: argparse.Namespace) -> None:
    if arguments.ranks < 1 or (arguments.ranks > 1 and arguments.dry_run):
        raise ConfigError(f"--ranks {arguments.ranks}: allowed is 1 or more, with --out")
    if arguments.ranks > 1 and LAUNCHED not in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--ranks beside torchrun: it has started the ranks; leave out --ranks")


def _trained(arguments: argparse.Namespace, settings: Settings, device: "torch.device") -> "Manifest | None":
    """The training, by this process or with other ranks; None after a forecast."""
    from lowbit_quantize.device import ranks
    from lowbit_recover.distill.distill import distill, prepare

    if not ranks.is_first():
        for name in ("distill", "quantize"):
            get_logger(name).setLevel("ERROR")
    given = arguments.checkpoint, arguments.base, arguments.data, settings
    task = prepare(*given, trust_remote_code=arguments.trust_remote_code)
    if arguments.dry_run:
        sys.stdout.write(json.dumps(_forecast(task)) + "\n")
        return None
    return distill(
        task, arguments.out, device, overwrite=arguments.overwrite, cache=arguments.teacher,
        moments_on_disk=arguments.optimizer_on_disk,
    )  # fmt: skip


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings that flags give; ConfigError where one is not allowed."""
    given = {one.name: getattr(arguments, one.name) for one in fields(Settings)}
    if given["learning_rate"] is None:
        given["learning_rate"] = LEARNING_RATES[arguments.train]
    return Settings(**given)


def _forecast(task: "Task") -> dict[str, Any]:
    """What `--dry-run` says, in bytes, on stderr for a person as well."""
    from lowbit_recover.distill.forecast import disk_bytes, memory_bytes, state_bytes, trained_parameters
    from lowbit_recover.distill.teacher import cache_bytes
    from lowbit_recover.distill.trainer import steps_of

    memory = memory_bytes(task.checkpoint, task.manifest, task.settings)
    trained = trained_parameters(task.checkpoint, task.settings)
    report: dict[str, Any] = {
        "trained_parameters": trained,
        "steps": steps_of(len(task.texts.training.ids), task.settings),
        "tokens": task.texts.training.ids.numel(),
        "memory_bytes": memory,
        "disk_bytes": {
            "teacher": cache_bytes(task.teacher_files),
            "state": state_bytes(trained),
            "all": disk_bytes(task.manifest, task.checkpoint, task.settings, task.teacher_files),
        },
    }
    parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in memory.items())
    sys.stderr.write(
        f"{trained:,} parameters train for {report['steps']} steps\n"
        f"memory, MiB: {parts}; in all {sum(memory.values()) / 2**20:,.0f}\n"
        f"disk, MiB: teacher {report['disk_bytes']['teacher'] / 2**20:,.0f}, state "
        f"{report['disk_bytes']['state'] / 2**20:,.0f}, in all {report['disk_bytes']['all'] / 2**20:,.0f}\n"
    )
    return report


def summary(manifest: "Manifest", out: str) -> dict[str, Any]:
    """The result in one flat object."""
    step = manifest.steps[-1]
    return {
        "checkpoint": out,
        "accepted": manifest.gate.accepted,
        "kld_before": step.kld_before,
        "mean_kld": step.mean_kld,
        "kld_stderr": step.kld_stderr,
        "trained_parameters": step.trained_parameters,
        "changed_bytes": step.changed_bytes,
        "bytes": step.bytes,
        "best_step": step.best_step,
        "seconds": step.seconds,
        "cpu_seconds": step.cpu_seconds,
        "peak_rss_bytes": manifest.run.peak_rss_bytes,
    }


command = Command(
    "Teach a checkpoint with its base's own distributions: scales and norms, or all weights.",
    _add_arguments,
    _run,
)
