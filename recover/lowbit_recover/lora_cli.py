"""`lowbit lora`: flags in; a line on stdout that says what was gained and how it is served."""

import argparse
import os
import sys

from lowbit_core.cli import Command, file_path
from lowbit_core.errors import ConfigError

NOT_WITH_MERGE = ("data", "heldout", "base")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="directory of a quantized or 16-bit model, or hub id"
    )
    parser.add_argument("--out", metavar="DIR", type=file_path, required=True, help="where the adapter goes")
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        help="conversations or texts: a file, a folder or hub:NAME (docs/texts.md)",
    )
    parser.add_argument("--heldout", metavar="SOURCE", help="others, to judge by (every fifth of --data)")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="train towards the distributions of this model, on --data (or default), not on answers",
    )
    parser.add_argument(
        "--merge", metavar="ADAPTER", type=file_path, help="train nothing: merge this adapter into CHECKPOINT"
    )
    _add_training_arguments(parser.add_argument_group("training"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--overwrite", action="store_true", help="begin anew where DIR holds another run's adapter"
    )


def _add_training_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--rank", type=_count, default=16, metavar="N", help="(16) of up to 512, which engines load"
    )
    parser.add_argument(
        "--alpha", type=_positive, metavar="X", help="the product is added alpha / rank times (2 rank)"
    )
    parser.add_argument(
        "--targets",
        default="all-linear",
        metavar="A,B,…",
        help="linears by the last part of their names (all-linear)",
    )
    parser.add_argument("--epochs", type=_positive, default=3.0, metavar="X", help="passes over the data (3)")
    parser.add_argument(
        "--rate", type=_positive, default=2e-4, metavar="X", help="of AdamW at its highest (2e-4)"
    )
    parser.add_argument("--batch-size", type=_count, default=8, metavar="N", help="examples a step (8)")
    parser.add_argument(
        "--max-seq-length", type=_count, default=512, metavar="N", help="longer examples are left out (512)"
    )
    parser.add_argument(
        "--num-samples",
        type=_count,
        default=256,
        metavar="N",
        help="with --base: sequences to train on (256)",
    )
    parser.add_argument(
        "--evaluations", type=_count, default=6, metavar="N", help="of the held-out loss, and saves (6)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(0)")
    parser.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="compute layers twice, and keep one's inputs only",
    )


def _run(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads: idle threads sleep, not spin
    os.environ.setdefault("TQDM_DISABLE", "1")
    _check_flags(arguments)
    from lowbit_recover.lora import Task, merge_adapter, train_adapter  # torch takes seconds
    from lowbit_recover.lora_training import Settings

    if arguments.merge is not None:
        merge_adapter(arguments.checkpoint, arguments.merge, arguments.out)
        sys.stdout.write(f"{arguments.out}: {arguments.checkpoint} with {arguments.merge.name} merged\n")
        return 0
    settings = Settings(
        rank=arguments.rank,
        alpha=arguments.alpha or 2.0 * arguments.rank,
        targets=tuple(part.strip() for part in arguments.targets.split(",")),
        epochs=arguments.epochs,
        rate=arguments.rate,
        batch_size=arguments.batch_size,
        max_seq_length=arguments.max_seq_length,
        num_samples=arguments.num_samples,
        seed=arguments.seed,
        evaluations=arguments.evaluations,
        gradient_checkpointing=arguments.gradient_checkpointing,
    )
    record = train_adapter(
        Task(
            arguments.checkpoint, arguments.data or "default", arguments.out, arguments.heldout, arguments.base,
            arguments.device, arguments.overwrite, settings,
        )
    )  # fmt: skip
    sys.stdout.write(
        f"{arguments.out}: held-out {record['objective']}: {record['heldout_before']:.4f} before, "
        f"{record['heldout_after']:.4f} after {record['kept_after_step']} of {record['steps']} steps\n"
        f"serve it beside the model: lowbit serve {arguments.checkpoint} --lora-modules "
        f"{arguments.out.resolve().name}={arguments.out}{_rank_flag(arguments.rank)}\n"
    )
    return 0


def _check_flags(arguments: argparse.Namespace) -> None:
    if arguments.merge is not None:
        if given := next((name for name in NOT_WITH_MERGE if getattr(arguments, name) is not None), None):
            raise ConfigError(f"--{given} is for training, and --merge trains nothing; leave one of them out")
        return
    if arguments.data is None and arguments.base is None:
        raise ConfigError(
            "nothing to train on: give --data SOURCE (your conversations), or --base MODEL to win back what was lost"
        )
    if arguments.rank > 512:
        raise ConfigError(f"--rank {arguments.rank}: engines load adapters of rank up to 512; give less")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("lowbit lora trains in one process; start it without torchrun")


def _rank_flag(rank: int) -> str:
    """What `lowbit serve` must be told of a rank above its own limit."""
    return (
        ""
        if rank <= 16
        else f" --max-lora-rank {next(one for one in (32, 64, 128, 256, 320, 512) if rank <= one)}"
    )


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError
    return number


command = Command(
    "Train a LoRA adapter on a checkpoint: for a task of yours, or to win back what low bits lost.",
    _add_arguments,
    _run,
)
