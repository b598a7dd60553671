"""The output directory of a training: whose it is, what a killed run goes on from, and what it leaves.

Everything that is not the result lies in `.run`: the identity of the run, the teacher, the last step (parameters,
optimizer, the curve so far) and the best one, each written aside and renamed, so that a run that is killed at any point
goes on from a whole one.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from lowbit_core.durable import disk_errors, move, write_text
from lowbit_core.errors import CheckpointError, OutputError
from lowbit_core.manifest import MANIFEST_NAME, PROGRESS_NAME, Manifest, read_manifest
from lowbit_core.manifest_files import verify_files
from lowbit_quantize.run.directory import STATE, refuse_foreign

IDENTITY, LAST, BEST = "identity.json", "last.pt", "best.pt"
OVERWRITE = "give --overwrite to begin anew"


@dataclass(frozen=True)
class TrainingDirectory:
    """The output directory of a training that holds it."""

    out: Path

    @property
    def scratch(self) -> Path:
        """Where files are until they are whole."""
        return self.out / STATE / "scratch"

    @property
    def teacher(self) -> Path:
        return self.out / STATE / "teacher"

    def moments(self, rank: int) -> Path:
        """Where the optimizer's state lies, if not in memory, of each rank."""
        return self.out / STATE / f"moments-{rank}"

    @property
    def result(self) -> Path:
        """Where the checkpoint is made, before it is moved to its place."""
        return self.out / STATE / "result"

    def save(self, name: str, data: dict[str, Any]) -> None:
        """Write a state, whole or not at all; OSError where the disk refuses."""
        temporary = self.scratch / name
        try:
            with disk_errors():
                torch.save(data, temporary)
        except RuntimeError as error:  # torch's writer says of a full disk that its archive is broken
            raise OSError(28, f"the state of the training could not be written ({error})") from error
        move(temporary, self.out / STATE / name)

    def load(self, name: str) -> dict[str, Any] | None:
        """A state that was saved; None where there is none."""
        path = self.out / STATE / name
        if not path.is_file():
            return None
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return found


def finished_before(out: Path, identity: dict[str, Any]) -> Manifest | None:
    """The manifest of this very training, if `out` holds its result; OutputError where it holds another's."""
    if not (out / MANIFEST_NAME).is_file():
        return None
    try:
        manifest = read_manifest(out)
        assert manifest is not None
        verify_files(out, manifest, hashes=False)
    except CheckpointError as error:
        raise OutputError(
            f"output {out} holds a damaged checkpoint ({error}); give a new directory, or {OVERWRITE}"
        ) from error
    made = manifest.steps[-1].identity if manifest.steps else {}
    if changes := _differences(made, identity):
        raise OutputError(
            f"output {out} holds another checkpoint ({changes}); give a new directory, or {OVERWRITE}"
        )
    return manifest


@contextmanager
def training_in(out: Path, identity: dict[str, Any], *, overwrite: bool) -> Iterator[TrainingDirectory]:
    """Hold `out` for one training, which goes on where an unfinished one of the same identity stopped.

    OutputError where another run holds it, where another's state lies there, and where the disk takes no more.
    """
    directory, state = TrainingDirectory(out), out / STATE
    refuse_foreign(out)
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock = FileLock(state / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise OutputError(f"output {out} is being written by another run; wait for it to end") from None
        try:
            _begin(directory, identity, overwrite)
            yield directory
            (out / PROGRESS_NAME).unlink(missing_ok=True)
            shutil.rmtree(state, ignore_errors=True)
        finally:
            lock.release()
    except OSError as error:
        raise OutputError(
            f"output {out}: {error.strerror or error}; what was finished is kept: remove the cause and run the same "
            "command again"
        ) from error


def _begin(directory: TrainingDirectory, identity: dict[str, Any], overwrite: bool) -> None:
    out, path = directory.out, directory.out / STATE / IDENTITY
    if overwrite:
        _forget(out)
    elif (out / MANIFEST_NAME).exists():
        raise OutputError(f"output {out}: another run has just finished in it; run the command again")
    elif (out / PROGRESS_NAME).is_file() and not path.is_file():
        raise OutputError(f"output {out} holds an unfinished run of lowbit quantize; give a new directory")
    elif path.is_file() and (changes := _differences(_read(path), identity)):
        raise OutputError(
            f"output {out} holds an unfinished training that was told otherwise ({changes}); undo that, give another "
            f"directory, or {OVERWRITE}"
        )
    for folder in (directory.scratch, directory.result):
        shutil.rmtree(folder, ignore_errors=True)
    directory.scratch.mkdir(parents=True)
    write_text(path, json.dumps(identity, indent=2) + "\n", directory.scratch)
    write_text(out / PROGRESS_NAME, json.dumps(identity, indent=2) + "\n", directory.scratch)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _differences(left: dict[str, Any], now: dict[str, Any]) -> str:
    """Which entries differ, by name; empty where none does."""
    names = [name for name in sorted(left.keys() | now.keys()) if left.get(name) != now.get(name)]
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def _forget(out: Path) -> None:
    """Remove what an earlier run of ours left: its state, and the files that its manifest names."""
    with suppress(CheckpointError):
        manifest = read_manifest(out)
        for name in manifest.files if manifest else ():
            path = out / name
            if path.resolve().is_relative_to(out.resolve()):
                path.unlink(missing_ok=True)
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    (out / PROGRESS_NAME).unlink(missing_ok=True)
    for path in (out / STATE).iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()
