"""The output directory of a run: whose it is, who is writing to it, and what may be removed from it.

A run marks its directory with a progress record and holds a lock on it; the manifest, written last, makes it a
checkpoint. Nothing is ever removed but files that a run of ours writes.
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowbit_core.errors import CheckpointError, OutputError
from lowbit_core.manifest import MANIFEST_NAME, PROGRESS_NAME, Manifest, read_manifest, verify_files
from lowbit_quantize.export import TOKENIZER_FILES
from lowbit_quantize.source import INDEX_NAME

UNPACKED = ".base"  # where a GGUF base lies, unpacked, during a run
OURS = ("model-*.safetensors", INDEX_NAME, "config.json", "quantize_config.json", *TOKENIZER_FILES)


def refuse_foreign(out: Path) -> None:
    """Raises OutputError where `out` is not new, empty, a checkpoint of ours or an unfinished run."""
    if out.is_dir():
        known = (out / MANIFEST_NAME).is_file() or (out / PROGRESS_NAME).is_file()
        if any(out.iterdir()) and not known:
            raise OutputError(f"output {out} holds something else; give a directory that is new or empty")
        return
    blocking = next((path for path in (out, *out.parents) if path.exists() or path.is_symlink()), None)
    if blocking is not None and not blocking.is_dir():
        raise OutputError(f"output {out}: {blocking} is not a directory; give one that is new or empty")


def finished_before(out: Path, fingerprint: dict[str, Any]) -> Manifest | None:
    """The manifest of this very run, if `out` holds its whole result; raises OutputError for another's."""
    if not (out / MANIFEST_NAME).is_file():
        return None
    try:
        manifest = read_manifest(out)
        assert manifest is not None
        verify_files(out, manifest, hashes=False)
    except CheckpointError as error:
        raise OutputError(
            f"output {out} holds a damaged checkpoint ({error}); give a new directory"
        ) from error
    texts = [manifest.calibration.sha256 if manifest.calibration else None, manifest.quality.heldout.sha256]
    if {"recipe": manifest.recipe, "base": manifest.base.sha256, "texts": texts} != fingerprint:
        raise OutputError(
            f"output {out} holds a checkpoint of another model, recipe or text; give a new directory"
        )
    return manifest


def check_disk(out: Path, needed_bytes: int, free_bytes: Callable[[Path], int] | None = None) -> None:
    """Raises OutputError where the disk under `out` is too small."""
    existing = next(parent for parent in (out, *out.resolve().parents) if parent.exists())
    free = free_bytes(existing) if free_bytes else shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise OutputError(
            f"output {out} needs {needed_bytes / 2**20:.0f} MiB and its disk has {free / 2**20:.0f} MiB free; "
            "free some or give another directory"
        )


@contextmanager
def run_in(out: Path, fingerprint: dict[str, Any]) -> Iterator[None]:
    """Hold `out` for one run; what an earlier unfinished run of the same kind left there is removed.

    Raises OutputError when another run holds it, or another kind of run was left unfinished in it.
    """
    record = json.dumps(fingerprint, indent=2) + "\n"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / PROGRESS_NAME).open("a+", encoding="utf-8") as progress:
            _lock(progress, out)
            progress.seek(0)
            left = progress.read()
            if left and left != record:
                raise OutputError(
                    f"output {out} holds an unfinished run of another model, recipe or text; "
                    "give a new directory, or remove this one"
                )
            _remove_ours(out)
            progress.truncate(0)
            progress.write(record)
            progress.flush()
            yield
            shutil.rmtree(out / UNPACKED, ignore_errors=True)
            (out / PROGRESS_NAME).unlink()
    except OSError as error:
        raise OutputError(f"output {out}: {error}") from error


def _lock(progress: Any, out: Path) -> None:
    try:
        fcntl.flock(progress, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"output {out} is being written by another run; wait for it to end") from None


def _remove_ours(out: Path) -> None:
    shutil.rmtree(out / UNPACKED, ignore_errors=True)
    for pattern in OURS:
        for path in out.glob(pattern):
            path.unlink()
