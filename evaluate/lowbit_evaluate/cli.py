"""`lowbit evaluate`: flags in; a table on stdout, and with --json everything in a file.

In process it loads each model whole (run.py). With --target the items go to a served endpoint, through the entry
point that core looks up, and only the base is loaded here.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lowbit_core.cli import Command
from lowbit_core.errors import ConfigError, EngineError
from lowbit_core.evals import report
from lowbit_core.evals.endpoint import Endpoint, find_connect
from lowbit_core.evals.items import Item, Key
from lowbit_core.evals.scoring import Answer
from lowbit_core.evals.tasks import TASKS, load_items, load_own_items
from lowbit_core.log import get_logger
from lowbit_quantize.progress import track

if TYPE_CHECKING:
    from lowbit_evaluate.run import Settings
    from lowbit_quantize.source import ModelReference

log = get_logger("evaluate")
FROM_MANIFEST = ""  # --text without a source
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
    parser.add_argument("--tasks", metavar="A,B,…", type=_names, default=(), help=f"of: {', '.join(TASKS)}")
    parser.add_argument("--items", metavar="FILE.jsonl", type=Path, help="your own items (docs/evaluate.md)")
    parser.add_argument(
        "--limit", metavar="N", type=_at_least_1, help="items of each task, drawn by --seed (all)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="(0)")
    parser.add_argument(
        "--tasks-dir", metavar="DIR", type=Path, help="the tasks' data, where it is not installed"
    )
    parser.add_argument(
        "--text",
        nargs="?",
        const=FROM_MANIFEST,
        metavar="SOURCE",
        help="KL, agreement and perplexity on held-out text: by default the one that MODEL's manifest names, or "
        "default, FILE.jsonl, FILE.txt, IDS.json, hub:DATASET",
    )
    parser.add_argument("--target", metavar="URL", help="ask a served OpenAI-compatible endpoint instead")
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="also write everything here, answers included"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="what models loaded here compute in (auto: what they are served in)",
    )
    parser.add_argument(
        "--kv-cache",
        default="checkpoint",
        choices=("checkpoint", "none"),
        help="round keys and values as the checkpoint's FP8 cache does, or not",
    )
    parser.epilog = "With --target the API key is read from the environment variable LOWBIT_API_KEY."


def _run(arguments: argparse.Namespace) -> int:
    _check_flags(arguments)
    items = _items(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads: idle threads sleep, not spin
    os.environ.setdefault("TQDM_DISABLE", "1")  # our progress is enough
    if arguments.target:
        document, ours, base = _served(arguments, items)
    else:
        document, ours, base = _in_process(arguments, items)
    if items:
        document |= report.tasks_document(items, ours, base)
    _show(arguments, document, ours, base)
    if arguments.json:
        arguments.json.write_text(json.dumps(document) + "\n", encoding="utf-8")
    if lost := sum(one.chosen is None and one.acc is not None for one in ours.values()):
        raise EngineError(
            f"{lost} of {len(ours)} items got no answer and count as wrong; see the server's log"
        )
    return 0


def _check_flags(arguments: argparse.Namespace) -> None:
    if not arguments.tasks and arguments.items is None and arguments.text is None:
        raise ConfigError("nothing is asked: give --tasks, --items, --text or several of them")
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


Answers = dict[Key, Answer]


def _in_process(
    arguments: argparse.Namespace, items: Sequence[Item]
) -> tuple[dict[str, Any], Answers, Answers | None]:
    """Everything is found and checked before the first model is loaded."""
    settings = _settings(arguments)
    from lowbit_evaluate import run

    model = run.find(arguments.model)
    reference, known = _base(arguments.base, items)
    if reference and arguments.text is not None:
        run.check_same_tokens(model, reference)
    text = run.text_of(arguments.text or None, model) if arguments.text is not None else None
    base = run.judge(reference, items, text, settings, "base") if reference else None
    ours = run.judge(model, items, text, settings, "model")
    document = _header(arguments, fp8_cache=ours.fp8_cache)
    if text:
        document["text"] = run.text_document(base, ours, text, model)
    return document, ours.answers, base.answers if base else known


def _served(
    arguments: argparse.Namespace, items: Sequence[Item]
) -> tuple[dict[str, Any], Answers, Answers | None]:
    """The endpoint is asked first: whether it is there shows at once."""
    endpoint = find_connect()(arguments.target, arguments.model)
    reference, known = _base(arguments.base, items)
    ours = _ask(endpoint, items)
    if reference:
        from lowbit_evaluate import run

        known = run.judge(reference, items, None, _settings(arguments), "base").answers
    return _header(arguments, served=endpoint.model), ours, known


def _ask(endpoint: Endpoint, items: Sequence[Item]) -> Answers:
    found = {one.key: one for one in track(endpoint.answers(items), len(items), f"{endpoint.model}: items")}
    return {item.key: found[item.key] for item in items}


def _base(name: str | None, items: Sequence[Item]) -> tuple["ModelReference | None", Answers | None]:
    """A model to judge, or answers that are known."""
    if name is None:
        return None, None
    if name.endswith(".json"):
        return None, report.read_base(Path(name), items)
    _import_torch()
    from lowbit_evaluate import run

    return run.find(name), None


def _settings(arguments: argparse.Namespace) -> "Settings":
    torch = _import_torch()
    from lowbit_evaluate.run import Settings

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device here; allowed: auto, cpu")
    name = "cuda" if arguments.device != "cpu" and torch.cuda.is_available() else "cpu"
    return Settings(torch.device(name), arguments.dtype, arguments.kv_cache == "checkpoint")


def _import_torch() -> Any:
    try:
        import torch
    except ImportError:
        raise ConfigError(
            "judging a model in process needs torch and transformers; run `pip install 'lowbit[cpu]'` or [gpu], or "
            "give --target URL of a served endpoint"
        ) from None
    return torch


def _header(arguments: argparse.Namespace, **found: Any) -> dict[str, Any]:
    names = ("limit", "seed", "dtype", "kv_cache", "device")
    settings = {name: getattr(arguments, name) for name in names}
    return report.header(arguments.model, arguments.base, arguments.target, {**settings, **found})


def _show(
    arguments: argparse.Namespace, document: dict[str, Any], ours: Answers, base: Answers | None
) -> None:
    console = Console(width=None if sys.stdout.isatty() else TABLE_COLUMNS)
    against = f" against {arguments.base}" if arguments.base else ""
    if ours:
        console.print(report.table(f"{arguments.model}{against}", ours, base))
    if "text" in document:
        console.print(text_table(document["text"]))


def text_table(text: dict[str, Any]) -> Table:
    """Quality on held-out text, and the riding figure beside it."""
    heldout = text["heldout"]
    shown = Table(
        show_header=False, title=f"held-out text: {heldout['source']}, {text['predictions']:,} predictions"
    )
    if "mean_kld" in text:
        shown.add_row(
            "mean KL to the base", f"{text['mean_kld']:.5f} ± {text['kld_stderr']:.5f} nats per token"
        )
        shown.add_row("top-1 agreement", f"{text['top1_agreement']:.2%} ± {text['top1_stderr']:.2%}")
        shown.add_row("perplexity of the base", f"{text['perplexity_base']:.4f}")
    shown.add_row("perplexity", f"{text['perplexity']:.4f}")
    shown.add_row("FP8 cache", "included" if text["kv_cache_included"] else "not included")
    if riding := text.get("riding"):
        verdict = "agrees" if riding["agrees"] else "DIFFERS by more than the standard error"
        shown.add_row(
            "mean KL of the manifest", f"{riding['mean_kld']:.5f} ± {riding['kld_stderr']:.5f}: {verdict}"
        )
    return shown


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if unknown := [name for name in names if name not in TASKS]:
        raise ConfigError(f"unknown task {unknown[0]!r}; tasks are: {', '.join(TASKS)}")
    return names


def _at_least_1(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


command = Command("Ask tasks and compare with the base: accuracy, flips, KL.", _add_arguments, _run)
