"""Safetensors files that are whole or not there."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lowbit_core.durable import disk_errors, move


def write_tensors(path: Path, tensors: Mapping[str, Tensor], scratch: Path) -> None:
    """Write a safetensors file, readable by every user; raises OSError where the disk cannot take it."""
    temporary = scratch / path.name
    contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    with disk_errors():
        save_file(contiguous, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)  # safetensors leaves 0600; a container's user must read it
    move(temporary, path)
