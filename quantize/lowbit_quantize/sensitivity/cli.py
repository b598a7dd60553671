"""`lowbit sensitivity` and `lowbit allocate`: flags in, one JSON object out as the last line of stdout."""

import argparse
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowbit_core.cli import Command, file_path
from lowbit_core.errors import ConfigError, OutputError
from lowbit_core.pages.chart import Table
from lowbit_quantize.recipe import load_recipe
from lowbit_quantize.sensitivity.assignment import Assignment, best, of_checkpoint, uniform
from lowbit_quantize.sensitivity.correction import factors_of
from lowbit_quantize.sensitivity.report import Sensitivity, read_sensitivity, write_sensitivity, write_whole

RECIPE, CANDIDATES, TOKENS = "gptq-g64", "W4A16,W8A8:smoothquant+gptq", 4096
GIB = 1 << 30
UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _add_sensitivity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="as --model of lowbit quantize")
    parser.add_argument(
        "--recipe", default=RECIPE, help=f"whose linears, methods and texts (default {RECIPE})"
    )
    parser.add_argument(
        "--candidates",
        default=CANDIDATES,
        metavar="SCHEME[:GROUP_SIZE][:METHOD+METHOD],…",
        help=f"what decisions may take; none are weights as they are (default {CANDIDATES})",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=TOKENS,
        metavar="N",
        help=f"that errors are felt on; candidates are made on as many others (default {TOKENS})",
    )
    parser.add_argument(
        "--out", type=file_path, metavar="FILE", help="JSON file; beside it FILE.html, a page"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the labels that are drawn from the model")
    parser.add_argument(
        "--dry-run", action="store_true", help="run nothing: memory, disk and time of the run"
    )
    parser.add_argument(
        "--stream-memory-gib",
        type=float,
        default=4.0,
        metavar="N",
        help="hidden states beyond this go to files beside FILE (default 4)",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--trust-remote-code", action="store_true", help="as of lowbit quantize")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key"
    )


def _sensitivity(arguments: argparse.Namespace) -> int:
    if (arguments.out is None) != arguments.dry_run:
        raise ConfigError("give --out FILE for sensitivities, or --dry-run for what they take, one of them")
    if arguments.tokens < 1 or arguments.stream_memory_gib < 0:
        raise ConfigError("--tokens is 1 or more, --stream-memory-gib 0 or more")
    recipe = load_recipe(arguments.recipe, tuple(arguments.set))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads: idle threads sleep, not spin
    from lowbit_quantize.device.chosen import chosen_device
    from lowbit_quantize.sensitivity.decisions import parse_candidates
    from lowbit_quantize.sensitivity.forecast import forecast
    from lowbit_quantize.sensitivity.measure import measure, prepare
    from lowbit_quantize.sensitivity.page import as_html, kind_table, uniform_table

    candidates = parse_candidates(arguments.candidates, recipe)
    device = chosen_device(arguments.device)
    memory_bytes = int(arguments.stream_memory_gib * GIB)
    remote: dict[str, Any] = {"trust_remote_code": arguments.trust_remote_code}
    if arguments.dry_run:
        prepared = prepare(arguments.model, recipe, candidates, arguments.tokens, **remote)
        report = forecast(prepared, memory_bytes).report() | {"decisions": len(prepared.decisions)}
        sys.stdout.write(json.dumps(report) + "\n")
        return 0
    out: Path = arguments.out
    _check_out(out)
    found = measure(
        arguments.model, recipe, candidates, arguments.tokens, device, out=out.resolve(),
        seed=arguments.seed, stream_memory_bytes=memory_bytes, **remote,
    )  # fmt: skip
    write_sensitivity(out, found)
    out.with_name(f"{out.name}.html").write_text(as_html(found), encoding="utf-8")
    _show(uniform_table(found), kind_table(found))
    sys.stdout.write(json.dumps(_summary(found, out)) + "\n")
    return 0


def _summary(found: Sensitivity, out: Path) -> dict[str, Any]:
    names = [
        one.name
        for one in found.candidates
        if all(one.name in d.choices for d in found.decisions if d.modules)
    ]
    return {
        "sensitivity": str(out),
        "decisions": len(found.decisions),
        "predicted_kl_of_uniform": {name: uniform(found, name).kl for name in names},
        **found.run.model_dump(include={"seconds", "cpu_seconds", "peak_rss_bytes"}),
    }


def _add_allocate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sensitivity", type=file_path, metavar="FILE", help="what lowbit sensitivity wrote")
    parser.add_argument("--bits", type=float, metavar="N", help="bits of a code, on the mean over weights")
    parser.add_argument("--bytes", metavar="SIZE", help="of the checkpoint's tensors: 80MB, 4.5GiB")
    parser.add_argument(
        "--candidates", metavar="NAME,…", help="some of those that were measured (default all)"
    )
    parser.add_argument("--head", action="store_true", help="quantize the head too, where it is no embedding")
    parser.add_argument(
        "--measured",
        type=file_path,
        action="append",
        default=[],
        metavar="CHECKPOINT",
        help="made of these candidates: what it measured corrects what is predicted; may be given again",
    )
    parser.add_argument(
        "--out", type=file_path, required=True, metavar="FILE.yaml", help="the recipe, a new file"
    )


def _allocate(arguments: argparse.Namespace) -> int:
    if arguments.bits is None and arguments.bytes is None:
        raise ConfigError("give a budget: --bits 4.5, --bytes 80MB, or both")
    out: Path = arguments.out
    _check_out(out)
    if out.exists():
        raise OutputError(f"--out {out} is there already and may have been edited; give a new file")
    found = read_sensitivity(arguments.sensitivity)
    size = None if arguments.bytes is None else size_of(arguments.bytes)
    factors = factors_of([_measured(found, one) for one in arguments.measured])
    assignment = best(
        found, _some(found, arguments.candidates), bits=arguments.bits, most_bytes=size, head=arguments.head,
        factors=factors,
    )  # fmt: skip
    asked = [f"{arguments.bits:g} bits of a code"] if arguments.bits is not None else []
    asked += [arguments.bytes] if size is not None else []
    from lowbit_quantize.sensitivity.recipe_file import recipe_text

    write_whole(out, recipe_text(assignment, " and ".join(asked)))
    _show(assignment_table(assignment))
    report = {
        "recipe": str(out),
        "bits": round(assignment.bits, 4),
        "bytes": assignment.bytes,
        "predicted_kl": assignment.kl,
        "corrected_by": factors,
        "decisions": assignment.counts,
    }
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


def _measured(found: Sensitivity, directory: Path) -> tuple[Assignment, float]:
    """What a checkpoint has, and the KL that its run measured."""
    assignment, manifest = of_checkpoint(found, directory)
    return assignment, manifest.quality.mean_kld


def _some(found: Sensitivity, text: str | None) -> list[str]:
    """Names of the candidates that are allowed."""
    known = [one.name for one in found.candidates]
    names = known if text is None else [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"--candidates: {unknown[0]!r} was not measured; allowed are {', '.join(known)}")
    if not names:
        raise ConfigError(f"--candidates {text}: give some of {', '.join(known)}")
    return names


def size_of(text: str) -> float:
    """Bytes of `80MB`, `4.5GiB` or a plain number; raises ConfigError."""
    number = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if number is None or number[2].upper() not in UNITS:
        raise ConfigError(f"--bytes {text}: give a number and KB, MB, GB, KiB, MiB or GiB, such as 80MB")
    return float(number[1]) * UNITS[number[2].upper()]


def assignment_table(assignment: Assignment) -> Table:
    """What it has, beside one candidate everywhere."""
    rows = [["chosen", *_cells(assignment)]]
    for candidate in assignment.counts:
        try:
            plain = uniform(assignment.found, candidate)
            rows.append([f"all {candidate}", *_cells(replace(plain, factors=assignment.factors))])
        except KeyError:  # a decision that cannot have it
            continue
    return Table(["", "bits", "MB", "predicted KL (nats a token)"], rows)


def _cells(one: Assignment) -> list[str]:
    return [f"{one.bits:.3f}", f"{one.bytes / 1e6:,.1f}", f"{one.kl:.4g}"]


def _show(*tables: Table) -> None:
    from rich.console import Console
    from rich.table import Table as Shown

    console = Console(file=sys.stderr)
    for one in tables:
        shown = Shown()
        for place, column in enumerate(one.columns):
            shown.add_column(column, justify="right" if place else "left")
        for row in one.rows:
            shown.add_row(*row)
        console.print(shown)


def _check_out(out: Path) -> None:
    if not out.resolve().parent.is_dir() or out.is_dir():
        raise OutputError(f"--out {out}: give a file in a directory that exists")


sensitivity_command = Command(
    "Predict what each scheme costs in each part of a model, from one walk forward and back.",
    _add_sensitivity,
    _sensitivity,
)
allocate_command = Command(
    "Choose schemes under a budget of bits or bytes, from sensitivities; writes a recipe.",
    _add_allocate,
    _allocate,
)
