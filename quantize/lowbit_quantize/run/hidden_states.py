"""The hidden states of a walk by name: in memory up to a limit, in files of the output directory beyond it.

A spilled stream is a tensor over a shared file mapping, so whoever reads or writes it need not know. Its pages
belong to the system's file cache; `release` takes them off this process's account after each pass.
"""

import mmap
import os
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lowbit_quantize.device import ranks
from lowbit_quantize.run.tensor_file import write_tensors

MEMORY_BYTES = 4 << 30  # of all streams together, by default
SPILLED = ".stream"  # how the files of spilled ones end


class HiddenStates:
    """Tensors that are changed in place and never replaced."""

    def __init__(
        self, device: torch.device, directory: Path | None = None, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        self._device, self._directory, self._left_bytes = device, directory, memory_bytes
        self._tensors: dict[str, Tensor] = {}
        self._maps: list[mmap.mmap] = []

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    @property
    def spilled_bytes(self) -> int:
        """Bytes of the streams that are files."""
        return sum(map(len, self._maps))

    def new(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An empty stream, which is spilled when all streams no longer fit the limit."""
        needed = torch.Size(shape).numel() * dtype.itemsize
        if self._directory is None or needed <= self._left_bytes:
            self._left_bytes -= needed
            self._tensors[name] = torch.empty(shape, dtype=dtype, device=self._device)
        else:
            self._tensors[name] = torch.frombuffer(self._map(name, needed), dtype=dtype).view(shape)
        return self._tensors[name]

    def save(self, path: Path, scratch: Path) -> None:
        """Write all streams to one safetensors file."""
        write_tensors(path, self._tensors, scratch)

    def load(self, path: Path) -> None:
        """Make the streams that `save` wrote."""
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                saved = file.get_tensor(name)
                self.new(name, tuple(saved.shape), saved.dtype).copy_(saved)

    def release(self) -> None:
        """Forget the mapped pages of spilled streams; their content stays in the files."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)

    def _map(self, name: str, size: int) -> mmap.mmap:
        assert self._directory is not None
        own = f"{name}.{ranks.rank()}{SPILLED}" if ranks.rank() else f"{name}{SPILLED}"
        descriptor = os.open(self._directory / own, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.posix_fallocate(
                descriptor, 0, size
            )  # a full disk is an error here, and would be a SIGBUS later
            mapped = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        self._maps.append(mapped)
        return mapped
