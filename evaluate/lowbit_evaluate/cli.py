"""`lowbit evaluate`: flags in; a table on stdout, and with --json everything in a file."""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from lowbit_core.access import access_of, add_access_arguments, given_flag
from lowbit_core.cli import Command, file_path
from lowbit_core.errors import ConfigError, EngineError
from lowbit_core.evals.items import Item
from lowbit_core.evals.tasks import (
    REPRESENTATIVE,
    REPRESENTATIVE_ITEMS,
    TASKS,
    find_tasks_dir,
    load_items,
    load_own_items,
)
from lowbit_core.log import get_logger
from lowbit_core.names import did_you_mean
from lowbit_evaluate import report
from lowbit_evaluate.run import Outcome, evaluate
from lowbit_evaluate.settings import FROM_MANIFEST, Evaluation, Settings

log = get_logger("evaluate")

TABLE_COLUMNS = 180  # where stdout is no terminal


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="directory, FILE.gguf or hub id; with --target the served name, or the directory that is served",
    )
    parser.add_argument(
        "--base",
        metavar="BASE",
        help="model to compare with, or RESULT.json of an earlier `lowbit evaluate --json`",
    )
    parser.add_argument(
        "--tasks",
        metavar="A,B,…",
        type=_names,
        default=(),
        help=f"of: {', '.join(TASKS)}; by default, where nothing else is asked, {', '.join(REPRESENTATIVE)}",
    )
    parser.add_argument(
        "--items", metavar="FILE.jsonl", type=file_path, help="your own items (docs/evaluate.md)"
    )
    parser.add_argument(
        "--limit",
        metavar="N",
        type=_at_least_1,
        help=f"items of each task, drawn by --seed (all; {REPRESENTATIVE_ITEMS} of the tasks that run by default)",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="(0)")
    parser.add_argument(
        "--tasks-dir", metavar="DIR", type=file_path, help="the tasks' data, where it is not installed"
    )
    parser.add_argument(
        "--text",
        nargs="?",
        const=FROM_MANIFEST,
        metavar="SOURCE",
        help="KL, agreement and perplexity on held-out text: without SOURCE that of MODEL's manifest; SOURCE is "
        "default, a file, a folder or hub:NAME[:CONFIG][:SPLIT] (docs/texts.md), or IDS.json",
    )
    parser.add_argument("--target", metavar="URL", help="ask a served OpenAI-compatible endpoint instead")
    parser.add_argument(
        "--json", metavar="FILE", type=file_path, help="also write everything here, answers included"
    )
    add_access_arguments(parser.add_argument_group("how --target is asked"))
    _add_process_arguments(parser)
    parser.epilog = "With --target the API key is read from the environment variable LOWBIT_API_KEY."


def _add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """What holds in process only, without --target."""
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="what models compute in, in process (auto: the dtype they are served in)",
    )
    parser.add_argument(
        "--kv-cache",
        default="checkpoint",
        choices=("checkpoint", "none"),
        help="round keys and values as the checkpoint's FP8 cache does, or not, in process",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run, in process, a tokenizer that is code of the model's own",
    )


def _run(arguments: argparse.Namespace) -> int:
    _take_defaults(arguments)
    _check_flags(arguments)
    items = _items(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads: idle threads sleep, not spin
    os.environ.setdefault("TQDM_DISABLE", "1")  # our progress is enough
    outcome = evaluate(
        Evaluation(
            arguments.model,
            arguments.base,
            arguments.target,
            tuple(items),
            arguments.text,
            Settings(
                arguments.device,
                arguments.dtype,
                arguments.kv_cache == "checkpoint",
                arguments.trust_remote_code,
            ),
            access_of(arguments),
        )
    )
    if arguments.json:
        document = _document(arguments, items, outcome)
        arguments.json.write_text(json.dumps(document) + "\n", encoding="utf-8")
    _show(arguments, outcome)
    if lost := sum(one.chosen is None and one.acc is not None for one in outcome.answers.values()):
        raise EngineError(
            f"{lost} of {len(items)} items got no answer and count as wrong; see the server's log"
        )
    return 0


def _take_defaults(arguments: argparse.Namespace) -> None:
    """Tasks of several kinds, where nothing is asked and their data is there."""
    if arguments.tasks or arguments.items is not None or arguments.text is not None:
        return
    try:
        find_tasks_dir(arguments.tasks_dir)
    except ConfigError as error:
        raise ConfigError(
            f"nothing is asked: give --items or --text, or let tasks be asked: {error}"
        ) from error
    arguments.tasks, arguments.limit = REPRESENTATIVE, arguments.limit or REPRESENTATIVE_ITEMS
    log.info(
        "nothing is asked: %s, %d items of each (--tasks, --limit)",
        ", ".join(REPRESENTATIVE),
        arguments.limit,
    )


def _check_flags(arguments: argparse.Namespace) -> None:
    if not arguments.target and (flag := given_flag(arguments)):
        raise ConfigError(f"{flag} says how --target is asked; give --target too")
    if arguments.text is not None and arguments.target:
        raise ConfigError("--text compares whole distributions, which no endpoint gives; leave out --target")
    if arguments.text is not None and (arguments.base or "").endswith(".json"):
        raise ConfigError("--text needs the base model itself: --base RESULT.json holds answers only")
    if arguments.json and (arguments.json.is_dir() or not arguments.json.absolute().parent.is_dir()):
        raise ConfigError(
            f"--json {arguments.json} cannot be written: give a file in a directory that exists"
        )


def _items(arguments: argparse.Namespace) -> list[Item]:
    count = arguments.limit or sys.maxsize
    items = load_items(arguments.tasks, arguments.tasks_dir, count, arguments.seed)
    if arguments.items:
        items += load_own_items(arguments.items)
    most, times = next(iter(Counter(item.key for item in items).most_common(1)), (("", ""), 0))
    if times > 1:
        raise ConfigError(f"{times} items of task {most[0]} have the id {most[1]}; give each its own")
    return items


def _document(arguments: argparse.Namespace, items: Sequence[Item], outcome: Outcome) -> dict[str, Any]:
    settings = {name: getattr(arguments, name) for name in ("limit", "seed", "dtype", "kv_cache", "device")}
    document = report.header(arguments.model, arguments.base, arguments.target, {**settings, **outcome.found})
    if outcome.text:
        document["text"] = outcome.text | report.broken_of_text(outcome.text)
    return document | (report.tasks_document(items, outcome.answers, outcome.base) if items else {})


def _show(arguments: argparse.Namespace, outcome: Outcome) -> None:
    console = Console(width=None if sys.stdout.isatty() else TABLE_COLUMNS)
    against = f" against {arguments.base}" if arguments.base else ""
    if outcome.answers:
        console.print(report.tasks_table(f"{arguments.model}{against}", outcome.answers, outcome.base))
    if outcome.text:
        console.print(report.text_table(outcome.text))
    for line in report.broken_lines(outcome.text, outcome.answers, outcome.base):
        console.print(line)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if unknown := [name for name in names if name not in TASKS]:
        raise ConfigError(
            f"unknown task {unknown[0]!r}; {did_you_mean(unknown[0], TASKS)}tasks are: {', '.join(TASKS)}"
        )
    return names


def _at_least_1(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


command = Command("Run tasks and compare with the base: accuracy, flips, KL.", _add_arguments, _run)
