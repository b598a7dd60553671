"""Whether a file has changed since it was read: key files and certificates are read again when they have."""

from pathlib import Path


def file_stamp(path: Path) -> tuple[int, int, int] | None:
    """What differs when a file is another one or was written again; None where there is none."""
    try:
        status = path.stat()  # through the links that a mounted secret is made of
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size  # a clock tick may hold two writes
