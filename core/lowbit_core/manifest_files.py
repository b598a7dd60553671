"""The files that a manifest vouches for: recorded once they are on the disk, verified before they are read."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from lowbit_core.errors import CheckpointError
from lowbit_core.manifest import MANIFEST_NAME, PROGRESS_NAME, FileRecord, Manifest


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _readable_sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}; let the user that runs this read it"
        ) from error


def record_files(directory: Path, below: Iterable[str] = ()) -> dict[str, FileRecord]:
    """Size and hash of every file of a checkpoint except its own records, and of those that lie `below`, in folders."""
    names = {path.name for path in directory.iterdir() if path.is_file()} | set(below)
    own = {MANIFEST_NAME, PROGRESS_NAME}
    return {name: file_record(directory / name) for name in sorted(names - own)}


def file_record(path: Path) -> FileRecord:
    """Size and hash of a file that is on the disk: a manifest must not outlive what it vouches for."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileRecord(sha256=file_sha256(path), bytes=path.stat().st_size)


def verify_files(directory: Path, manifest: Manifest, *, hashes: bool) -> None:
    """Check that each file of the manifest is there with its size and, if asked, its hash.

    Raises CheckpointError naming the first file that differs.
    """
    for name, record in manifest.files.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{directory / MANIFEST_NAME} names {name!r}, which is not a file below it")
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{directory} is incomplete: {name} is missing; copy the checkpoint again")
        if path.stat().st_size != record.bytes:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, {MANIFEST_NAME} says {record.bytes}: "
                "it was changed or cut off after it was written; copy or quantize it again"
            )
        if hashes and _readable_sha256(path) != record.sha256:
            raise CheckpointError(
                f"{path} does not match its SHA-256 in {MANIFEST_NAME}: it was changed after it was written; "
                "copy or quantize it again"
            )
