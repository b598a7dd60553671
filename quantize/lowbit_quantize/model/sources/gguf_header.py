"""What a GGUF file says before its tensors begin, over all its parts: the first has the metadata, each its tensors.

transformers' reader is an order of magnitude faster than the package gguf's where a file holds a vocabulary; it reads
no part but the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from transformers.integrations.gguf import read_gguf_metadata

from lowbit_core.errors import ModelError


@dataclass(frozen=True)
class GgufHeader:
    """Metadata by its keys; of lists of words only those that were asked for. Names of all tensors."""

    metadata: dict[str, Any]
    tensors: frozenset[str]

    @property
    def architecture(self) -> str:
        """As llama.cpp calls it."""
        return str(self.metadata["general.architecture"])


def read_header(parts: tuple[Path, ...]) -> GgufHeader:
    """The header of a model; raises ModelError where a part is unreadable or not of this model."""
    try:
        metadata, names = read_metadata(parts[0])
    except ModelError:
        _later_part(parts, 0)  # which says more, where it is one under another name
        raise
    _check_part(parts, 0, metadata)
    for number in range(1, len(parts)):
        names += [tensor.name for tensor in _later_part(parts, number).tensors]
    count = metadata.get("split.tensors.count", len(names))
    if len(set(names)) < len(names) or len(names) != count:
        raise ModelError(
            f"{parts[0]} says that its {len(parts)} parts hold {count} tensors; they hold {len(names)}, "
            f"{len(set(names))} different ones: fetch them again"
        )
    if (kind := metadata.get("general.type", "model")) != "model":
        raise ModelError(f"{parts[0]} is no model, it is of type {kind!r}; give the model's own .gguf file")
    return GgufHeader(metadata, frozenset(names))


def read_metadata(path: Path, lists: Sequence[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """What a first part says, with these `lists` of words, and the names of its tensors; ModelError of any other."""
    try:
        metadata, names = read_gguf_metadata(str(path), lists)
    except Exception as error:  # whatever a wrong file makes of its code
        raise _unreadable(path, error) from error
    return metadata, list(names)


def open_part(path: Path) -> GGUFReader:
    """A part with its tensors; raises ModelError where it is unreadable."""
    try:
        return GGUFReader(path)
    except Exception as error:  # as above
        raise _unreadable(path, error) from error


def _later_part(parts: tuple[Path, ...], number: int) -> GGUFReader:
    reader = open_part(parts[number])
    keys = ("split.count", "split.no")
    _check_part(parts, number, {key: _value(reader, key) for key in keys})
    return reader


def _check_part(parts: tuple[Path, ...], number: int, said: dict[str, Any]) -> None:
    count, own = said.get("split.count") or 1, said.get("split.no") or 0
    if (count, own) != (len(parts), number):
        raise ModelError(
            f"{parts[number]} says that it is part {own + 1} of {count}; name the parts of a model "
            f"NAME-00001-of-{count:05d}.gguf and so on, and give any of them"
        )


def _value(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    return field.contents() if field else None


def _unreadable(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path} is not a readable GGUF file: {error}; fetch it again")
