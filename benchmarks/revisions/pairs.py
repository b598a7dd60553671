"""Old and new quantize processes in turn: CPU seconds and peak memory as the kernel counts them, new over old."""

import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.revisions.trees import Setting, Tree


@dataclass(frozen=True)
class Run:
    """One quantize process."""

    cpu_s: float
    wall_s: float
    peak_rss_bytes: int
    load_average: float  # of the machine over the minute before


@dataclass(frozen=True)
class Pair:
    """Two runs, one after the other; which of them is first alternates."""

    old: Run
    new: Run


FIGURES = ("cpu_s", "peak_rss_bytes")


def fewer(samples: int) -> tuple[Setting, ...]:
    """So many calibration sequences, and as many held-out ones."""
    return tuple(
        Setting(
            f"{section}.sequences={samples}", f"{section}.num_samples={samples}", f"{section}.num_samples"
        )
        for section in ("calibration", "quality")
    )


def measured_pairs(
    trees: tuple[Tree, Tree], count: int, model: Path, recipe: str, work: Path, settings: tuple[Setting, ...]
) -> list[Pair]:
    """Measure `count` pairs, one run at a time, and print each."""
    pairs = []
    for number in range(count):
        order = trees if number % 2 == 0 else trees[::-1]
        runs = {tree.name: _measured(tree, model, recipe, work, settings) for tree in order}
        pairs.append(Pair(runs["old"], runs["new"]))
        print(f"{recipe} {number + 1}/{count}: {pairs[-1]}", file=sys.stderr, flush=True)
    return pairs


def _measured(tree: Tree, model: Path, recipe: str, work: Path, settings: tuple[Setting, ...]) -> Run:
    out = work / f"{tree.name}-{recipe}"
    arguments = ("--model", str(model), "--recipe", recipe, "--out", str(out), *tree.spelled(settings))
    command = tree.command("quantize", *arguments)
    load_average, started_s = os.getloadavg()[0], time.monotonic()
    with (work / f"{tree.name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=tree.environment, cwd=tree.root)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(
            f"same_bytes: the {tree.name} run ended with {process.returncode}: {work / f'{tree.name}.log'}"
        )
    shutil.rmtree(out)
    wall_s = time.monotonic() - started_s
    cpu_s = usage.ru_utime + usage.ru_stime
    return Run(round(cpu_s, 2), round(wall_s, 2), usage.ru_maxrss * 1024, round(load_average, 2))


def ratios(pairs: Sequence[Pair]) -> dict[str, dict[str, float]]:
    """New over old of each figure: mean and standard error over pairs."""
    found = {}
    for figure in FIGURES:
        each = [getattr(pair.new, figure) / getattr(pair.old, figure) for pair in pairs]
        error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else math.nan
        found[figure] = {"mean": round(statistics.mean(each), 4), "standard_error": round(error, 4)}
    return found


def as_json(recipe: str, pairs: Sequence[Pair]) -> dict[str, Any]:
    return {"recipe": recipe, "new_over_old": ratios(pairs), "pairs": [asdict(pair) for pair in pairs]}
