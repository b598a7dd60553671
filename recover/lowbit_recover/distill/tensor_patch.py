"""Tensors of a safetensors file written over in place: all other bytes of the file stay what they are."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lowbit_core.errors import NumericsError
from lowbit_quantize.model.weights import is_finite


def patch_tensors(file: Path, tensors: Mapping[str, Tensor]) -> int:
    """Write those of the tensors that the file holds over theirs; returns the bytes that became others.

    Raises ValueError where a tensor has other bytes than the file has for it, NumericsError where one is not finite,
    OSError where the disk refuses.
    """
    changed = 0
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        for name in sorted(tensors.keys() & header.keys()):
            tensor = tensors[name]
            if not is_finite(tensor):
                raise NumericsError(f"the tensor {name} is not finite; it is not written")
            start, end = header[name]["data_offsets"]
            if list(tensor.shape) != header[name]["shape"] or tensor.nbytes != end - start:
                raise ValueError(
                    f"{name} has the shape {tuple(tensor.shape)} and {tensor.nbytes} bytes, the file another"
                )
            content = tensor.contiguous().flatten().view(torch.uint8).numpy()
            opened.seek(8 + length + start)
            before = torch.frombuffer(bytearray(opened.read(end - start)), dtype=torch.uint8).numpy()
            different = int((content != before).sum())
            if different:
                opened.seek(8 + length + start)
                opened.write(content.tobytes())
            changed += different
    return changed
