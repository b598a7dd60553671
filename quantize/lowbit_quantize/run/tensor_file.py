"""Safetensors files that are whole or not there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lowbit_core.durable import disk_errors, move

METADATA = {"format": "pt"}
ALIGNED = 8
SMALL_BYTES = (
    64 << 20
)  # of tensors: the room that their header leaves is taken away, which is nothing in larger files
ENTRY_BYTES = 320  # of a tensor in the header, which is written last into space that is kept for it
TYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Tensor], scratch: Path) -> None:
    """Write a safetensors file, readable by every user; raises OSError where the disk cannot take it."""
    temporary = scratch / path.name
    contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    with disk_errors():
        save_file(contiguous, temporary, metadata=METADATA)
    temporary.chmod(0o644)  # safetensors leaves 0600; a container's user must read it
    move(temporary, path)


class TensorFile:
    """A safetensors file that is written tensor by tensor: its header comes last, padded with spaces as it may be."""

    def __init__(self, path: Path, scratch: Path, tensors: int) -> None:
        """`tensors`: no fewer than will be written; `scratch` is a directory on the same disk."""
        self._path, self._temporary = path, scratch / path.name
        self._room = -(-(ENTRY_BYTES * (tensors + 1)) // ALIGNED) * ALIGNED
        self._header: dict[str, Any] = {"__metadata__": METADATA}
        self._odd: dict[str, Tensor] = {}
        self._end = 0
        self._file = self._temporary.open("wb")
        self._file.seek(8 + self._room)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Append tensors; raises OSError where the disk cannot take them.

        Those whose bytes are no multiple of eight, small ones, wait for the end: all lie where readers may map them.
        """
        for name, tensor in tensors.items():
            if tensor.nbytes % ALIGNED:
                self._odd[name] = tensor.detach().cpu().clone()
            else:
                self._append(name, tensor)

    def _append(self, name: str, tensor: Tensor) -> None:
        begin, self._end = self._end, self._end + tensor.nbytes
        self._header[name] = {
            "dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, self._end]
        }  # fmt: skip
        flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        self._file.write(flat.numpy().data)

    def _leave_no_room(self, needed: int) -> None:
        """Move what is written to where it would be behind a header of `needed` bytes."""
        content = self._temporary.read_bytes()[8 + self._room :]
        self._room = needed
        self._temporary.write_bytes(bytes(8 + needed) + content)

    def close(self) -> None:
        """The file is whole."""
        for name in sorted(self._odd, key=lambda one: -self._odd[one].itemsize):
            self._append(name, self._odd[name])
        header = json.dumps(self._header, separators=(",", ":")).encode()
        if len(header) > self._room:
            raise AssertionError(
                f"the header of {self._path.name} has {len(header)} bytes and room for {self._room}"
            )
        self._file.close()
        if self._end < SMALL_BYTES:
            self._leave_no_room(-(-len(header) // ALIGNED) * ALIGNED)
        with self._temporary.open("r+b") as file:
            file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._temporary.chmod(0o644)
        move(self._temporary, self._path)
