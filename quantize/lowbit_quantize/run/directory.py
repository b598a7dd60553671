"""The output directory of a run: whose it is, who is writing to it, and what may be removed from it.

A run marks its directory with a progress record, holds a lock on it, and keeps what it needs to go on in
`STATE`; the manifest, written last, makes it a checkpoint. Nothing is ever removed but files that a run of ours
writes.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ValidationError

from lowbit_core.durable import move, write_text
from lowbit_core.errors import CheckpointError, ModelError, NumericsError, OutputError
from lowbit_core.log import get_logger
from lowbit_core.manifest import MANIFEST_NAME, PROGRESS_NAME, Manifest, read_manifest
from lowbit_core.manifest_files import verify_files
from lowbit_quantize.device import ranks
from lowbit_quantize.model.weights import INDEX_NAME
from lowbit_quantize.run.identity import Identity, identity_in
from lowbit_quantize.run.journal import (
    OVERWRITE,
    ChosenLayers,
    Journal,
    ShardRecord,
    TrialResult,
    read_record,
    verify,
)

log = get_logger("quantize")

STATE = ".run"  # what an unfinished run needs to go on; gone when it has finished
TRIAL_NAME = "trial.json"
LAYERS_NAME = "layers.json"
COPIES_NAME = "copies.json"  # what a run has copied from its base, or is about to
OURS = ("model-*.safetensors", INDEX_NAME, "config.json", "quantize_config.json")


@dataclass(frozen=True)
class RunDirectory:
    """The output directory of a run that holds it."""

    out: Path

    @property
    def base(self) -> Path:
        """Where a GGUF base lies, unpacked."""
        return self.out / STATE / "base"

    @property
    def scratch(self) -> Path:
        """Where files are until they are whole."""
        return self.out / STATE / "scratch"

    def journal(self, walk: str) -> Journal:
        """The records of one of the run's walks."""
        return Journal(self.out / STATE / walk, self.scratch, writes=ranks.is_first())

    def shards(self, walk: str) -> Path:
        """Where a walk writes its shards that may not be the one that is kept."""
        directory = self.out / STATE / walk / "shards"
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def note_copies(self, names: Sequence[str]) -> None:
        """Remember, before they are copied, which files are the run's to remove."""
        write_text(self.out / STATE / COPIES_NAME, json.dumps(list(names)) + "\n", self.scratch)

    @property
    def trial(self) -> TrialResult | None:
        """How the trial of some passes ended, if it did."""
        path = self.out / STATE / TRIAL_NAME
        return read_record(path, TrialResult) if path.is_file() else None

    def end_trial(self, result: TrialResult) -> None:
        """Note which walk is kept."""
        write_text(self.out / STATE / TRIAL_NAME, result.model_dump_json() + "\n", self.scratch)

    @property
    def layers(self) -> ChosenLayers | None:
        """Which layers stay, once that was measured."""
        path = self.out / STATE / LAYERS_NAME
        return read_record(path, ChosenLayers) if path.is_file() else None

    def choose_layers(self, chosen: ChosenLayers) -> None:
        """Note which layers stay: a run that goes on does not measure again."""
        write_text(self.out / STATE / LAYERS_NAME, chosen.model_dump_json() + "\n", self.scratch)

    def keep_shards(self, walk: str, shards: Sequence[ShardRecord]) -> None:
        """Move the shards of a walk that is kept into the output; those that are there already are checked."""
        for shard in shards:
            path = self.shards(walk) / shard.file
            if path.is_file():
                verify(path, shard.written)
                move(path, self.out / shard.file)
            else:
                verify(self.out / shard.file, shard.written)


def refuse_foreign(out: Path) -> None:
    """Raises OutputError where `out` is not new, empty, a checkpoint of ours or an unfinished run."""
    if out.is_dir():
        known = (out / MANIFEST_NAME).is_file() or (out / PROGRESS_NAME).is_file()
        if any(path.name != STATE for path in out.iterdir()) and not known:
            raise OutputError(f"output {out} holds something else; give a directory that is new or empty")
        return
    blocking = next((path for path in (out, *out.parents) if path.exists() or path.is_symlink()), None)
    if blocking is not None and not blocking.is_dir():
        raise OutputError(f"output {out}: {blocking} is not a directory; give one that is new or empty")


def finished_before(out: Path, identity: Identity) -> Manifest | None:
    """The manifest of this very run, if `out` holds its whole result; raises OutputError for another's."""
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
    if differences := identity_in(manifest).differences(identity):
        raise OutputError(
            f"output {out} holds a checkpoint of another model, recipe or text: {'; '.join(differences)}; "
            f"give a new directory, or {OVERWRITE}"
        )
    if (out / STATE).exists() or (out / PROGRESS_NAME).exists():  # killed when all was done
        with suppress(OutputError, OSError), _held(out):
            _remove_state(out)
    return manifest


def check_disk(out: Path, needed_bytes: int, free_bytes: Callable[[Path], int] | None = None) -> None:
    """Raises OutputError where the disk under `out` is too small for what is not yet written of a run."""
    existing = next(parent for parent in (out, *out.resolve().parents) if parent.exists())
    free = free_bytes(existing) if free_bytes else shutil.disk_usage(existing).free
    needed_bytes -= sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if free < needed_bytes:
        raise OutputError(
            f"output {out} needs {needed_bytes / 2**20:.0f} MiB and its disk has {free / 2**20:.0f} MiB free; "
            "free some or give another directory"
        )


@contextmanager
def run_in(out: Path, identity: Identity, *, overwrite: bool = False) -> Iterator[RunDirectory]:
    """Hold `out` for one run, which goes on where an unfinished run of the same identity stopped.

    With `overwrite` all that a run of ours left there is removed first. Raises OutputError when another run holds it,
    when another kind of run was left unfinished in it, and when the disk takes no more.
    """
    directory = RunDirectory(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _held(out):
            _begin(directory, identity, overwrite)
            yield directory
            _remove_state(out)
    except OSError as error:
        raise OutputError(f"output {out}: {error.strerror or error}; {_kept(directory)}") from error
    except (NumericsError, ModelError) as error:
        if not _finished_layers(directory):
            _leave_no_trace(out)
            raise
        raise type(error)(f"{error}; {_kept(directory)}") from error


@contextmanager
def run_of_ranks(out: Path, identity: Identity, *, overwrite: bool = False) -> Iterator[RunDirectory]:
    """As `run_in` on the first rank; the others are given the directory when it is ready."""
    if ranks.is_first():
        with run_in(out, identity, overwrite=overwrite) as run:
            ranks.by_first(lambda: None)
            yield run
    else:
        ranks.by_first(lambda: None)
        yield RunDirectory(out)


def _begin(directory: RunDirectory, identity: Identity, overwrite: bool) -> None:
    """Bring `out` into the state from which this run begins or goes on; what differs is refused before."""
    out, progress = directory.out, directory.out / PROGRESS_NAME
    if overwrite:
        _forget_walks(out)
    elif (out / MANIFEST_NAME).exists():
        raise OutputError(f"output {out}: another run has just finished in it; run the command again")
    elif progress.exists():
        _refuse_other(directory, progress, identity)
    shutil.rmtree(directory.scratch, ignore_errors=True)
    directory.scratch.mkdir(parents=True)
    write_text(progress, identity.model_dump_json(indent=2) + "\n", directory.scratch)
    _remove_copies(out)
    for name in (MANIFEST_NAME, f"{MANIFEST_NAME}.tmp"):
        (out / name).unlink(missing_ok=True)
    _remove_ours(
        out, keep={shard.file for walk in _begun_walks(out) for shard in directory.journal(walk).shards}
    )


def _refuse_other(directory: RunDirectory, progress: Path, identity: Identity) -> None:
    out = directory.out
    try:
        left = Identity.model_validate_json(progress.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise OutputError(
            f"output {out} holds an unfinished run of another version of Lowbit; {OVERWRITE}"
        ) from error
    if left.walk_version != identity.walk_version:
        raise OutputError(
            f"output {out} holds an unfinished run of a Lowbit that computes other numbers "
            f"(walk version {left.walk_version}, now {identity.walk_version}): go on with that Lowbit, give another "
            f"directory, or {OVERWRITE}"
        )
    read = {name for walk in _begun_walks(out) for name in directory.journal(walk).base_files} | {
        "config.json"
    }
    differences = left.differences(identity, unread=left.base.keys() - read)
    if differences:
        raise OutputError(
            f"output {out} holds an unfinished run of another model, recipe or text: {'; '.join(differences)}; "
            f"undo that, give another directory, or {OVERWRITE}"
        )
    if left.threads != identity.threads:
        log.warning(
            "the run was begun with %d threads and goes on with %d: last bits may differ from an uninterrupted run",
            left.threads,
            identity.threads,
        )


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """The lock on `out`, which a process that dies gives back."""
    (out / STATE).mkdir(exist_ok=True)
    lock = FileLock(out / STATE / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(f"output {out} is being written by another run; wait for it to end") from None
    try:
        yield
    finally:
        lock.release()


def _begun_walks(out: Path) -> list[str]:
    return [path.parent.name for path in (out / STATE).glob("*/layer-00000.json")]


def _kept(directory: RunDirectory) -> str:
    """How far the run had come, for the end of an error's line."""
    layers = _finished_layers(directory)
    return f"{layers} finished layers are kept: remove the cause and run the same command again"


def _finished_layers(directory: RunDirectory) -> int:
    return sum(len(directory.journal(walk).layers) for walk in _begun_walks(directory.out))


def _leave_no_trace(out: Path) -> None:
    """Remove what a run has put into `out` before its first layer was finished, and `out` itself if that was all."""
    _remove_state(out)
    with suppress(OSError):
        out.rmdir()


def _remove_state(out: Path) -> None:
    (out / PROGRESS_NAME).unlink(missing_ok=True)
    shutil.rmtree(out / STATE, ignore_errors=True)


def _forget_walks(out: Path) -> None:
    """Remove every record of an earlier run, so that nothing of it can be gone on with."""
    for path in (out / STATE).iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name == TRIAL_NAME:
            path.unlink()


def _remove_copies(out: Path) -> None:
    """Remove what an earlier run of ours copied from its base: its manifest and its notes name that."""
    names: set[str] = set()
    with suppress(OSError, ValueError, TypeError):
        names |= set(json.loads((out / STATE / COPIES_NAME).read_text(encoding="utf-8")))
    with suppress(CheckpointError):
        manifest = read_manifest(out)
        names |= set(manifest.base.copied) if manifest else set()
    for name in names:
        path = out / name
        if path.resolve().is_relative_to(out.resolve()):
            path.unlink(missing_ok=True)
            _remove_empty_folders(path.parent, out)


def _remove_empty_folders(folder: Path, out: Path) -> None:
    while folder != out:
        try:
            folder.rmdir()
        except OSError:  # something of somebody's is in it
            return
        folder = folder.parent


def _remove_ours(out: Path, keep: set[str]) -> None:
    for pattern in OURS:
        for path in out.glob(pattern):
            if path.name not in keep:
                path.unlink()
