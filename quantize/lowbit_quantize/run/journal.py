"""What a run has finished, so that one that was killed goes on: a record of each layer, and the streams after it.

The order is what makes it safe. A layer's shard is whole and on the disk, then the streams that left the layer, then
the record that names both by their hashes; only then do the streams of the layer before go. Whatever a killed run
left without a record is written anew.
"""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from lowbit_core.durable import write_text
from lowbit_core.errors import OutputError
from lowbit_core.manifest import FileRecord, KVLayerRecord, ModuleRecord, QualityRecord
from lowbit_core.manifest_files import file_sha256
from lowbit_quantize.run.hidden_states import SPILLED, HiddenStates

OVERWRITE = "give --overwrite to start over"
Read = TypeVar("Read", bound=BaseModel)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class ShardRecord(_Record):
    """One shard: the file, its hash and size, its tensors and their bytes."""

    file: str
    written: FileRecord
    tensors: list[str]
    tensor_bytes: int


class UnopenedLinear(_Record):
    """A linear that plain transformers does not open: its shape, and some numbers of the weight that was measured."""

    shape: tuple[int, int]
    sample: list[float]


class LayerRecord(_Record):
    """What the manifest and the rest of the walk need to know of a finished layer.

    `base_files` are the base model's files that were read so far.
    """

    layer: int
    shard: ShardRecord
    modules: list[ModuleRecord]
    kv_scales: KVLayerRecord | None
    kept_experts: list[int] | None
    absorbed_by: dict[int, int] | None
    saliency: list[float] | None
    expert_tokens: list[int] | None
    under_calibrated: dict[int, int]
    figures: dict[str, float]
    base_files: list[str]
    streams: FileRecord
    unopened: dict[str, UnopenedLinear] = {}


class HeadRecord(_Record):
    """A quantized head, in a shard with the norm that it reads."""

    shard: ShardRecord
    module: ModuleRecord
    unopened: UnopenedLinear | None = None


class Conclusion(_Record):
    """The comparison at the end of a walk, and the head where it is quantized."""

    quality: QualityRecord
    base_files: list[str]
    head: HeadRecord | None = None


class TrialResult(_Record):
    """Held-out KL of a walk without the passes that are on trial and of one with them, and which one is kept."""

    kept: bool
    kld_without: float
    kld_with: float


class ChosenLayers(_Record):
    """The numbers of the base's layers that stay, and what the model would lose by each, by the recipe's criterion."""

    kept: list[int]
    scores: dict[int, float]


class Journal:
    """The records of one walk, in a directory of their own."""

    def __init__(self, directory: Path, scratch: Path, *, writes: bool = True) -> None:
        """Without `writes` what is done is only remembered: another process writes it down."""
        self.directory, self.scratch, self._writes = directory, scratch, writes
        self.layers: list[LayerRecord] = []
        while (path := self._layer_path(len(self.layers))).is_file():
            self.layers.append(read_record(path, LayerRecord))
        path = self._conclusion_path
        self.conclusion = read_record(path, Conclusion) if path.is_file() else None

    @property
    def base_files(self) -> set[str]:
        """The base model's files that finished work has read."""
        last: list[LayerRecord | Conclusion] = [*self.layers[-1:]]
        if self.conclusion:
            last.append(self.conclusion)
        return {name for record in last for name in record.base_files}

    @property
    def shards(self) -> list[ShardRecord]:
        """The shards of finished layers, and of a finished head."""
        head = self.conclusion.head if self.conclusion else None
        return [*(record.shard for record in self.layers), *([head.shard] if head else [])]

    def begin(self, shards: Path) -> None:
        """Get ready to add records of a walk whose shards lie in a directory.

        Raises OutputError where a shard or the streams are not what a record says.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self._remove_streams(keep=-1 if self.conclusion else len(self.layers) - 1)
        for shard in self.shards:
            verify(shards / shard.file, shard.written)
        if self.layers and not self.conclusion:
            verify(self._streams_path(self.layers[-1].layer), self.layers[-1].streams)

    def load_streams(self, streams: HiddenStates) -> None:
        """The streams as they left the last finished layer."""
        streams.load(self._streams_path(self.layers[-1].layer))

    def save_streams(self, layer: int, streams: HiddenStates) -> FileRecord:
        """Save the streams as they left a layer."""
        path = self._streams_path(layer)
        streams.save(path, self.scratch)
        return recorded(path)

    def finish(self, record: LayerRecord) -> None:
        """Note that a layer is done; its shard and streams are on the disk."""
        self.layers.append(record)
        if self._writes:
            write_text(self._layer_path(record.layer), record.model_dump_json() + "\n", self.scratch)
            self._remove_streams(keep=record.layer)

    def conclude(self, conclusion: Conclusion) -> None:
        """Note the comparison at the end of the walk; the streams are not needed any more."""
        self.conclusion = conclusion
        if self._writes:
            write_text(self._conclusion_path, conclusion.model_dump_json() + "\n", self.scratch)
            self._remove_streams(keep=-1)

    @property
    def _conclusion_path(self) -> Path:
        return self.directory / "quality.json"

    def _layer_path(self, layer: int) -> Path:
        return self.directory / f"layer-{layer:05d}.json"

    def _streams_path(self, layer: int) -> Path:
        return self.directory / f"streams-{layer:05d}.safetensors"

    def _remove_streams(self, keep: int) -> None:
        """Remove saved streams but those that left one layer; without any, what was spilled goes too."""
        for path in self.directory.glob("streams-*.safetensors"):
            if path != self._streams_path(keep):
                path.unlink()
        for path in self.directory.glob(f"*{SPILLED}") if keep < 0 else ():
            path.unlink()


def recorded(path: Path) -> FileRecord:
    """Size and hash of a file."""
    return FileRecord(sha256=file_sha256(path), bytes=path.stat().st_size)


def verify(path: Path, record: FileRecord) -> None:
    """Raises OutputError where a file is not what a record says of it."""
    if not path.is_file():
        raise OutputError(f"{path} of the unfinished run is missing; put it back or {OVERWRITE}")
    if recorded(path) != record:
        raise OutputError(f"{path} of the unfinished run was changed after it was written; {OVERWRITE}")


def read_record(path: Path, kind: type[Read]) -> Read:
    """A record of this version; raises OutputError."""
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise OutputError(f"{path} is not a record of this version of Lowbit; {OVERWRITE}") from error
