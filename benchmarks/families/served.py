"""Whether stock vLLM says what plain transformers says, for a checkpoint of a model that was taught sentences."""

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

LIMIT_S = 400.0
MOST = 400  # characters of an error
ELSEWHERE = "check the logs"  # vLLM's error of a model that it could not inspect; why not is an earlier one
TIE = 1.0  # logits between a choice and the next best, below which two texts say nothing about each other


def served(checkpoint: Path) -> dict[str, Any]:
    """Tokens before the first near tie of each text that are equal, or what the engine said."""
    answers = {}
    for what in ("reference", "engine"):
        found = _greedy(what, checkpoint)
        if "no" in found:
            return {"no": f"{'vLLM' if what == 'engine' else 'transformers'}: {found['no']}"}
        answers[what] = found
    ours, theirs = answers["reference"], answers["engine"]
    clear = equal = 0
    for text, same, gaps in zip(theirs["texts"], ours["texts"], ours["gaps"], strict=True):
        end = next((i for i, gap in enumerate(gaps) if gap < TIE), len(gaps))
        clear += end
        equal += sum(one == other for one, other in zip(text[:end], same[:end], strict=True))
    return {
        "equal": equal,
        "clear": clear,
        "tokens": sum(map(len, ours["texts"])),
        "logp_apart": _apart(ours, theirs),
        "kv_cache_dtype": theirs["kv_cache_dtype"],
    }


def words(found: dict[str, Any]) -> str:
    """A cell of the table."""
    if "no" in found:
        return f"no: {found['no']}"
    said = f"{found['equal']} of {found['clear']} ({found['tokens']})"
    return f"{said}; its base {words(found['base'])}" if "base" in found else said


def _apart(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The median of |log p(engine) - log p(transformers)| over equal texts' tokens."""
    apart = [
        abs(one - other)
        for text, same, row, base in zip(
            theirs["texts"], ours["texts"], theirs["logprobs"], ours["logprobs"], strict=True
        )
        for token, right, one, other in zip(text, same, row, base, strict=True)
        if token == right
    ]
    return round(statistics.median(apart), 5) if apart else float("nan")


def _greedy(what: str, checkpoint: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.e2e.greedy", what, str(checkpoint)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, env=dict(os.environ), check=False
        )
    except subprocess.TimeoutExpired:
        return {"no": f"no answer after {LIMIT_S:.0f} s"}
    line = next((one for one in done.stdout.splitlines() if one.startswith("TEXTS ")), None)
    if line is None:
        return {"no": last_error(f"{done.stdout}\n{done.stderr}", done.returncode)}  # vLLM logs to stdout
    found: dict[str, Any] = json.loads(line.removeprefix("TEXTS "))[str(checkpoint)]
    return found


def last_error(printed: str, status: int) -> str:
    """The last error without what marks the process that wrote it; the one before, where it sends people to the log."""
    lines = [
        re.sub(r"^(\(.*?\)\s*|\[rank\d+\]:\s*|ERROR.*?\]\s*)+", "", one).strip()
        for one in printed.splitlines()
    ]
    named = [place for place, one in enumerate(lines) if re.match(r"[\w.]*(Error|Exception)\b", one)]
    errors = [_error(lines[place:]) for place in named]
    while len(errors) > 1 and ELSEWHERE in errors[-1]:
        errors.pop()
    if errors:
        return errors[-1][:MOST]
    return (lines or [f"ended with status {status} without a word"])[-1][:MOST]


def _error(lines: list[str]) -> str:
    """An error with the lines that belong to it: all up to the next traceback."""
    end = next((place for place, one in enumerate(lines) if one.startswith("Traceback ")), len(lines))
    return " ".join(one for one in lines[:end] if one)
