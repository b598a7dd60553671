"""The chosen candidate as a recipe that `lowbit quantize` takes, with what was asked and predicted in comments."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowbit_core.errors import OutputError
from lowbit_core.kv_cache import GIB
from lowbit_plan.place import Place
from lowbit_plan.report import check_words
from lowbit_plan.sections import ROWS
from lowbit_plan.targets import Targets
from lowbit_plan.verdict import Verdict

TEXT = (
    f"{ROWS} rows of calibration text lose least; --set calibration.num_samples=32 takes a tenth of the time and, "
    "of the 4-bit demo, loses a quarter more."
)


def check_out(out: Path) -> None:
    """Refuse a file that is there, which may have been edited, and a folder that is not."""
    if out.exists():
        raise OutputError(f"--out {out} is there already and may have been edited; give a new file")
    if not out.resolve().parent.is_dir():
        raise OutputError(f"--out {out}: give a file in a directory that exists")


def recipe_text(model: str, one: Verdict, targets: Targets, place: Place, *, closeness: str) -> str:
    """The file. `closeness` says where the order of candidates, or the predicted KL, is from."""
    lines = [
        f"# {model} on {place.name}, by `lowbit plan`: {one.candidate.name}.",
        *(f"# {words}" for words in (check_words(check) for check in one.checks)),
        f"# Weights {one.weights_bytes / GIB:.3f} GiB; {targets.streams} streams of {targets.context} tokens need "
        f"{one.kv_bytes / GIB:.3f} GiB of cache.",
        f"# {closeness}",
        *([f"# {TEXT}"] if one.candidate.sections["passes"] else []),
        f"# Serve it with: {' '.join(['lowbit serve DIR', *serve_flags(one, targets, place)])}",
        f"description: {json.dumps(f'{one.candidate.name}, by lowbit plan')}",
        *(line for key, value in one.candidate.sections.items() for line in _section(key, value)),
    ]
    return "\n".join(lines) + "\n"


def serve_flags(one: Verdict, targets: Targets, place: Place) -> list[str]:
    """Flags of `lowbit serve` under which the plan holds."""
    flags = ["--max-model-len", str(targets.context), "--max-num-seqs", str(targets.streams)]
    if place.card is None:
        flags += ["--kv-cache-gib", f"{-(-one.kv_bytes * 1000 // GIB) / 1000:.3f}"]
    return flags


def _section(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, list) and value and not isinstance(value[0], str):
        yield f"{key}:"
        yield from (f"  - {json.dumps(item)}" for item in value)
    else:
        yield f"{key}: {json.dumps(value)}"
