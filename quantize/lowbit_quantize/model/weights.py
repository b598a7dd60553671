"""The safetensors of a model directory, read one tensor at a time."""

import json
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lowbit_core.errors import ModelError, NumericsError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


class WeightFiles:
    """The safetensors of a directory, read one tensor at a time; raises ModelError on a file that is unreadable."""

    def __init__(self, directory: Path, unpacked_from: Collection[str] = ()) -> None:
        """`unpacked_from` names the files that the directory was unpacked from, which then count as read."""
        self.directory, self._source = directory, unpacked_from
        self.files = _weight_files(directory)
        self.read_files = set(unpacked_from)
        self._places: dict[str, tuple[str, tuple[int, ...], str]] = {}  # name: file, shape, dtype
        for file in self.files:
            with self._open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    view = opened.get_slice(name)
                    self._places[name] = (file, tuple(view.get_shape()), view.get_dtype())

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name][1]

    def dtype(self, name: str) -> str:
        """As safetensors calls it: BF16, F32, …"""
        return self._places[name][2]

    def bytes(self, name: str) -> int:
        """Bytes of one tensor."""
        return math.prod(self.shape(name)) * DTYPE_BYTES.get(self.dtype(name), 1)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as stored; raises NumericsError where it holds what is no finite number."""
        if name not in self._places:
            raise ModelError(f"{self.directory} lacks the tensor {name}; the model is incomplete")
        if not self._source:
            self.read_files.add(self._places[name][0])
        with self._open(self._places[name][0]) as file:
            tensor: torch.Tensor = file.get_tensor(name)
        if not is_finite(tensor):
            where = self.directory / self._places[name][0]
            raise NumericsError(f"the weight {name} in {where} holds values that are not finite")
        return tensor

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        try:
            with safe_open(self.directory / file, framework="pt") as opened:
                yield opened
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{self.directory / file} cannot be read: {error}; fetch the model again"
            ) from error


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are finite; it needs no memory beside the tensor."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    least, largest = torch.aminmax(tensor)
    return bool(torch.isfinite(least) & torch.isfinite(largest))


def _weight_files(directory: Path) -> list[str]:
    index = directory / INDEX_NAME
    if not index.is_file():
        return [SINGLE_NAME]
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ModelError(f"{index} is not a safetensors index: {error!r}; fetch the model again") from error
