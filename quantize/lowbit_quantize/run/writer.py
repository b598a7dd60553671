"""Writes shards as the walk produces them, and the index and configuration at the end.

A tensor that is not finite is refused here, whatever made it.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit_core.errors import NumericsError
from lowbit_quantize.model.files.weights import INDEX_NAME, is_finite
from lowbit_quantize.run.journal import ShardRecord, recorded
from lowbit_quantize.run.tensor_file import write_tensors


class CheckpointWriter:
    """The files of one checkpoint."""

    def __init__(self, directory: Path, shards: int, scratch: Path | None = None) -> None:
        """`scratch` is where files are until they are whole, on the disk of `directory`."""
        self.directory, self._shards, self._scratch = directory, shards, scratch or directory
        self._written: list[ShardRecord] = []

    def write_shard(self, tensors: Mapping[str, Tensor]) -> ShardRecord:
        """Write one shard; raises NumericsError on a tensor that is not finite."""
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not is_finite(tensor):
                raise NumericsError(f"the tensor {name} is not finite; it is not written")
        file = f"model-{len(self._written) + 1:05d}-of-{self._shards:05d}.safetensors"
        write_tensors(self.directory / file, tensors, self._scratch)
        record = ShardRecord(
            file=file,
            written=recorded(self.directory / file),
            tensors=list(tensors),
            tensor_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        )
        self._written.append(record)
        return record

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


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """A JSON file as people read it."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
