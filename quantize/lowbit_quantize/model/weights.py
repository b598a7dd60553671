"""The safetensors of a model directory, read one tensor at a time, by the names that they have in the files."""

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
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "I32": 4, "I16": 2}  # of others 1
AGAIN = "fetch the model again"


class WeightFiles:
    """The safetensors of a directory, read one tensor at a time.

    Raises ModelError on a file that is unreadable, and where two files or an index could be meant: engines choose
    differently (vLLM reads what the index names, transformers the single file).
    """

    def __init__(self, directory: Path, unpacked_from: Collection[str] = ()) -> None:
        """`unpacked_from` names the files that the directory was unpacked from, which then count as read."""
        self.directory, self._source = directory, unpacked_from
        index = _index(directory)
        self.files = [SINGLE_NAME] if index is None else sorted(set(index.values()))
        self.read_files = set(unpacked_from)
        self._places: dict[str, tuple[str, tuple[int, ...], str]] = {}  # name: file, shape, dtype
        for file in self.files:
            with self._open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    view = opened.get_slice(name)
                    if name in self._places:
                        self._refuse_other(name, file)
                    self._places[name] = (file, tuple(view.get_shape()), view.get_dtype())
        for name, file in (index or {}).items():
            self._check_place(name, file)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name][1]

    def dtype(self, name: str) -> str:
        """As safetensors calls it: BF16, F32, F8_E4M3, …"""
        return self._places[name][2]

    def bytes(self, name: str) -> int:
        """Bytes of one tensor."""
        return math.prod(self.shape(name)) * DTYPE_BYTES.get(self.dtype(name), 1)

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """One tensor, or one entry of its first dimension, as stored; raises NumericsError where it holds what is no
        finite number.
        """
        if name not in self._places:
            raise ModelError(f"{self.directory} lacks the tensor {name}; the model is incomplete")
        file = self._places[name][0]
        if not self._source:
            self.read_files.add(file)
        with self._open(file) as opened:
            tensor: torch.Tensor = opened.get_tensor(name) if row is None else opened.get_slice(name)[row]
        if not is_finite(tensor):
            raise NumericsError(
                f"the weight {name} in {self.directory / file} holds values that are not finite"
            )
        return tensor

    def _refuse_other(self, name: str, file: str) -> None:
        """Two files may hold the same tensor, if it is the same."""
        first = self._places[name][0]
        with self._open(first) as one, self._open(file) as other:
            if one.get_slice(name).get_shape() == other.get_slice(name).get_shape() and torch.equal(
                one.get_tensor(name), other.get_tensor(name)
            ):
                return
        raise ModelError(
            f"{self.directory}: {first} and {file} hold different tensors {name}; remove the one that is wrong"
        )

    def _check_place(self, name: str, file: str) -> None:
        if name not in self._places:
            raise ModelError(
                f"{self.directory / INDEX_NAME} names the tensor {name}, which {file} lacks; {AGAIN}"
            )

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        try:
            with safe_open(self.directory / file, framework="pt") as opened:
                yield opened
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.directory / file} cannot be read: {error}; {AGAIN}") from error


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are finite; it needs no memory beside the tensor."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:  # 8-bit floats have no aminmax
        return bool(torch.isfinite(tensor.to(torch.float32)).all()) if tensor.dtype != E8M0 else True
    least, largest = torch.aminmax(tensor)
    return bool(torch.isfinite(least) & torch.isfinite(largest))


E8M0 = torch.float8_e8m0fnu


def _index(directory: Path) -> dict[str, str] | None:
    """The file of each tensor; None where one file holds them all."""
    path = directory / INDEX_NAME
    if not path.is_file():
        return None
    try:
        index = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        named = sorted(set(index.values()))
        if not named or not all(isinstance(file, str) for file in named):
            raise TypeError("weight_map names no files")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ModelError(f"{path} is not a safetensors index: {error!r}; {AGAIN}") from error
    if (directory / SINGLE_NAME).is_file() and SINGLE_NAME not in named:
        raise ModelError(
            f"{directory} holds {SINGLE_NAME} and {INDEX_NAME}, which names {named[0]}: transformers reads the one, "
            "vLLM the other; remove the one that is stale"
        )
    outside = next((file for file in named if Path(file).name != file), None)
    if outside is not None:
        raise ModelError(f"{path} names {outside!r}, which is no file name; {AGAIN}")
    return index
