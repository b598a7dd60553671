"""The directory of an adapter: whose run it holds, room on its disk, and files that are whole or not there."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowbit_core.durable import disk_errors
from lowbit_core.errors import OutputError
from lowbit_recover import lora_state as saved
from lowbit_recover.lora_examples import Example
from lowbit_recover.lora_model import CONFIG, WEIGHTS
from lowbit_recover.lora_state import STATE, State

RECORD = "lora.json"
DISK_FACTOR = 10  # bytes at the peak, over those of the trained numbers: both files twice, and Adam's


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    """A directory on the disk of `out` while the block runs; a full disk is an OutputError."""
    scratch = out / ".scratch"
    scratch.mkdir(exist_ok=True)
    try:
        with disk_errors():
            yield scratch
    except OSError as error:
        raise OutputError(
            f"--out {out}: {error.strerror or error}; make room and run the same command again"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_disk(out: Path, numbers: int) -> None:
    """Raise OutputError where the disk cannot hold both files and what a killed run goes on from."""
    place = next(one for one in (out, *out.absolute().parents) if one.is_dir())
    needed, free = DISK_FACTOR * 4 * numbers, shutil.disk_usage(place).free
    if free < needed:
        raise OutputError(
            f"--out {out}: an adapter of {numbers:,} numbers needs {needed / 1e6:,.0f} MB while it is trained, "
            f"and the disk has {free / 1e6:,.0f}; make room, or lower --rank"
        )


def digest(examples: Sequence[Example]) -> str:
    """A hash of what training sees."""
    return hashlib.sha256(json.dumps([(one.ids, one.counts) for one in examples]).encode()).hexdigest()


def begun(out: Path, identity: Mapping[str, Any], *, overwrite: bool) -> State | None:
    """What an earlier process left of this very run; raises OutputError where the directory holds something else."""
    if overwrite:
        for name in (STATE, RECORD, CONFIG, WEIGHTS):
            (out / name).unlink(missing_ok=True)
        return None
    record, state = out / RECORD, saved.load(out)
    if state is None and not record.is_file():
        if out.exists() and (not out.is_dir() or set(out.iterdir()) - {out / saved.SCRATCH}):
            raise OutputError(f"--out {out} holds something else; give a new directory")
        return None
    there = state.identity if state else json.loads(record.read_text(encoding="utf-8"))["identity"]
    if there != identity:
        raise OutputError(
            f"--out {out} holds an adapter of another run ({', '.join(_differences(there, identity))} differ); give "
            "another directory, or --overwrite"
        )
    return state


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for key in dict.fromkeys((*before, *now)):
        one, other = before.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += [f"{key}.{part}" for part in _differences(one, other)]
        elif one != other:
            found.append(str(key))
    return found
