"""Writes shards as the walk produces them, and the index and configuration at the end.

A tensor that is not finite is refused here, whatever made it.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit_core.errors import NumericsError
from lowbit_quantize.model.weights import INDEX_NAME, is_finite
from lowbit_quantize.run.journal import ShardRecord, recorded
from lowbit_quantize.run.tensor_file import TensorFile, write_tensors


class CheckpointWriter:
    """The files of one checkpoint."""

    def __init__(self, directory: Path, shards: int, scratch: Path | None = None) -> None:
        """`scratch` is where files are until they are whole, on the disk of `directory`."""
        self.directory, self._shards, self._scratch = directory, shards, scratch or directory
        self._written: list[ShardRecord] = []

    def begin_shard(self, tensors: int) -> "OpenShard":
        """A shard that is written part by part, of at most so many tensors."""
        return OpenShard(self, self._next_path, tensors)

    @property
    def _next_path(self) -> Path:
        return self.directory / f"model-{len(self._written) + 1:05d}-of-{self._shards:05d}.safetensors"

    def write_shard(self, tensors: Mapping[str, Tensor]) -> ShardRecord:
        """Write one shard; raises NumericsError on a tensor that is not finite."""
        _check_finite(tensors)
        path = self._next_path
        write_tensors(path, tensors, self._scratch)
        return self.note(path, list(tensors), sum(tensor.nbytes for tensor in tensors.values()))

    def note(self, path: Path, tensors: list[str], tensor_bytes: int) -> ShardRecord:
        """Take up a shard that is whole."""
        record = ShardRecord(
            file=path.name, written=recorded(path), tensors=tensors, tensor_bytes=tensor_bytes
        )
        self._written.append(record)
        return record

    @property
    def scratch(self) -> Path:
        """Where files are until they are whole."""
        return self._scratch

    def adopt(self, shards: Iterable[ShardRecord]) -> None:
        """Go on after shards that lie there already."""
        self._written += shards

    def finish(self, config: Mapping[str, Any]) -> None:
        """Write the index and config.json."""
        file_of = {name: shard.file for shard in self._written for name in shard.tensors}
        index = {"metadata": {"total_size": self.tensor_bytes}, "weight_map": dict(sorted(file_of.items()))}
        write_json(self.directory / INDEX_NAME, index)
        write_json(self.directory / "config.json", config)

    @property
    def tensor_bytes(self) -> int:
        return sum(shard.tensor_bytes for shard in self._written)


class OpenShard:
    """A shard that is not whole yet."""

    def __init__(self, writer: CheckpointWriter, path: Path, tensors: int) -> None:
        self._writer, self._path = writer, path
        self._file = TensorFile(path, writer.scratch, tensors)
        self._names: list[str] = []
        self._bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write some more; raises NumericsError on a tensor that is not finite."""
        _check_finite(tensors)
        self._file.add(tensors)
        self._names += tensors
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())

    def close(self) -> ShardRecord:
        """The shard is whole."""
        self._file.close()
        return self._writer.note(self._path, self._names, self._bytes)


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise NumericsError(f"the tensor {name} is not finite; it is not written")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """A JSON file as people read it."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
