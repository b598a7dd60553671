"""A few numbers of a checkpoint's safetensors files, read without a tensor library.

The format is 8 bytes of length, JSON, raw tensors; scales are a handful of scalars.
"""

import json
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lowbit_core.errors import CheckpointError


def tensor_names(directory: Path) -> Iterator[str]:
    """The names of all tensors in a checkpoint's safetensors files, from their headers."""
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            yield from _header(file, path)[0]


def stored_numbers(
    directory: Path, pattern: re.Pattern[str]
) -> Iterator[tuple[re.Match[str], Sequence[float]]]:
    """All numbers of each tensor whose name has the pattern."""
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            header, begin = _header(file, path)
            for name, entry in header.items():
                if match := pattern.search(name):
                    start, stop = entry["data_offsets"]
                    file.seek(begin + start)
                    yield match, _decode(file.read(stop - start), entry["dtype"], name)


def as_float32(value: float) -> float:
    """A number as float32 holds it."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the offset at which its tensors begin."""
    try:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    except (struct.error, ValueError, MemoryError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    return header, 8 + header_bytes


def _decode(raw: bytes, dtype: str, name: str) -> Sequence[float]:
    if dtype == "BF16":  # the upper half of a float32
        raw = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
        dtype = "F32"
    letters = {"F32": ("f", 4), "F16": ("e", 2), "F64": ("d", 8)}
    if dtype not in letters or not raw:
        raise CheckpointError(f"{name} has dtype {dtype} and {len(raw)} bytes; a scale is a float")
    letter, size = letters[dtype]
    return struct.unpack(f"<{len(raw) // size}{letter}", raw)
