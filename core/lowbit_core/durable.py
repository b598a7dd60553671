"""Files that are whole or not there, whatever ends the process: written aside, flushed to the disk, then renamed."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SYSTEM_ERROR = re.compile(r"os error (\d+)")


def write_text(path: Path, text: str, scratch: Path) -> None:
    """Write a text file; `scratch` is a directory on the same disk that holds it until it is whole."""
    temporary = scratch / path.name
    temporary.write_text(text, encoding="utf-8")
    move(temporary, path)


def move(temporary: Path, path: Path) -> None:
    """Flush a file, or a directory's files, to the disk and rename it to `path`, which outlives a power cut."""
    for part in (*temporary.rglob("*"), temporary):
        _flush(part)
    temporary.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise what libraries written in Rust say of the disk (full, read-only) as the OSError that it was."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if number := SYSTEM_ERROR.search(str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise
