"""The base model's distributions on the training rows: its likeliest words, on disk, made once and memory-mapped.

Three files: words, their log-probabilities, and the log of the mass of all other words; a fourth has the last hidden
states where they are taught. Space is taken before anything is computed, since a write to a mapped file on a full disk
ends the process without a word. What a killed run has made of them is used again.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowbit_core.durable import write_text
from lowbit_core.progress import track
from lowbit_evaluate.loaded_model import LoadedModel
from lowbit_quantize.model.logits import LogitsForm
from lowbit_recover.distill.losses import Soft, soft_of

DONE = "rows.json"
ROWS_AT_ONCE = 4
POSITIONS_AT_ONCE = 256  # whose logits are in memory
FLUSH_ROWS = 64


@dataclass(frozen=True)
class Cache:
    """The teacher of (rows, positions) on disk; `hidden` is None where states are not taught."""

    words: NDArray[np.int32]
    log_probabilities: NDArray[np.float32]
    rest: NDArray[np.float32]
    hidden: NDArray[np.float32] | None

    def soft(self, rows: Tensor) -> Soft:
        """The teacher of some rows, positions one after the other."""
        places = rows.numpy()
        return Soft(
            torch.from_numpy(self.words[places]).long().flatten(0, 1),
            torch.from_numpy(self.log_probabilities[places]).flatten(0, 1),
            torch.from_numpy(self.rest[places]).flatten(),
        )

    def states(self, rows: Tensor) -> Tensor | None:
        """Hidden states of some rows, (positions, hidden)."""
        return None if self.hidden is None else torch.from_numpy(self.hidden[rows.numpy()]).flatten(0, 1)


def cache_files(rows: int, tokens: int, k: int, hidden: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each file of a teacher of `rows` rows of `tokens` tokens; `hidden` is 0 without states."""
    places = (rows, tokens - 1)
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "words": ("int32", (*places, k)),
        "log_probabilities": ("float32", (*places, k)),
        "rest": ("float32", places),
    }
    return found | ({"hidden": ("float32", (*places, hidden))} if hidden else {})


def cache_bytes(files: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Bytes of these files."""
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in files.values())


def open_cache(folder: Path, files: Mapping[str, tuple[str, tuple[int, ...]]], *, writable: bool) -> Cache:
    """Map the files of a folder, and make them where they are not; OSError where the disk has no room for them."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {}
    for name, (dtype, shape) in files.items():
        path, size = folder / f"{name}.bin", math.prod(shape) * np.dtype(dtype).itemsize
        if not path.exists() or path.stat().st_size != size:
            (folder / DONE).unlink(missing_ok=True)
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        arrays[name] = np.memmap(path, dtype=dtype, mode="r+" if writable else "r", shape=shape)
    return Cache(arrays["words"], arrays["log_probabilities"], arrays["rest"], arrays.get("hidden"))


def rows_done(folder: Path) -> int:
    """How many rows of the teacher are whole."""
    path = folder / DONE
    return int(json.loads(path.read_text(encoding="utf-8"))["rows"]) if path.is_file() else 0


def fill_cache(
    cache: Cache, folder: Path, scratch: Path, base: LoadedModel, ids: Tensor, temperature: float
) -> None:
    """Run the base on the rows, (rows, tokens), that are not done yet."""
    start, k = rows_done(folder), cache.words.shape[-1]
    places = range(start, len(ids), ROWS_AT_ONCE)
    for first in track(places, len(places), "base: training rows"):
        rows = slice(first, min(len(ids), first + ROWS_AT_ONCE))
        states = base.hidden(ids[rows])[:, :-1]  # (rows, positions, hidden)
        if cache.hidden is not None:
            cache.hidden[rows] = states.float().cpu().numpy()
        found = [soft_of(logits, k, temperature) for logits in _logits(base, states.flatten(0, 1))]
        shape = states.shape[:2]
        cache.words[rows] = torch.cat([one.words for one in found]).view(*shape, k).int().cpu().numpy()
        known = torch.cat([one.log_probabilities for one in found]).view(*shape, k)
        cache.log_probabilities[rows] = known.cpu().numpy()
        cache.rest[rows] = torch.cat([one.rest for one in found]).view(shape).cpu().numpy()
        if rows.stop % FLUSH_ROWS == 0 or rows.stop == len(ids):
            _flush(cache)
            write_text(folder / DONE, json.dumps({"rows": rows.stop}) + "\n", scratch)


def _logits(base: LoadedModel, states: Tensor) -> Any:
    head = base.head
    for some in states.split(POSITIONS_AT_ONCE):
        yield formed(base.logits, some.float() @ head.float().T)


def formed(form: LogitsForm, logits: Tensor) -> Tensor:
    """Logits of what a head gives, (positions, words), not in place: the way back needs what there was."""
    if form.factor != 1:
        logits = logits * form.factor
    return logits if form.cap is None else (logits / form.cap).tanh() * form.cap


def _flush(cache: Cache) -> None:
    for array in (cache.words, cache.log_probabilities, cache.rest, cache.hidden):
        if isinstance(array, np.memmap):
            array.flush()
