"""A checkpoint's tensors as llama.cpp names and lays them out, one in memory at a time."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map, quants
from torch import Tensor

from lowbit_core.errors import CheckpointError
from lowbit_quantize.export.checkpoint import Checkpoint
from lowbit_quantize.export.gguf.blocks import BLOCK, block_type, blocks_of, row_bytes
from lowbit_quantize.export.gguf.families import GgufFamily
from lowbit_quantize.schemes.scheme import Quantized

CHUNK_NUMBERS = 1 << 22  # of a matrix, at once
REST = {
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
EXPERT = re.compile(r"(?P<before>.*\.experts)\.(?P<number>\d+)\.(?P<after>.*)")
KV_SCALES = ("k_scale", "v_scale")
ROUTER = ".ffn_gate_inp"
ROTARY_TABLE = "rotary_emb.inv_freq"
HALF_MAX = 65504.0


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: the checkpoint's tensors that it is made of, several where experts are stacked.

    `shape` is of each; `kind` is what its numbers are stored as.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    stacked: bool = False

    @property
    def full_shape(self) -> tuple[int, ...]:
        return (len(self.sources), *self.shape) if self.stacked else self.shape

    @property
    def nbytes(self) -> int:
        rows = int(np.prod(self.full_shape[:-1], dtype=np.int64))
        return rows * row_bytes(self.kind, self.shape[-1])


FLAT = ("ffn_gate_inp_shexp.weight", "shortconv.conv.weight")  # of one row, of one channel each


class GgufTensors:
    """What a checkpoint's file will hold; raises CheckpointError where llama.cpp has no place for something."""

    def __init__(self, checkpoint: Checkpoint, family: GgufFamily, config: Any, rest: str) -> None:
        self._checkpoint, self._family, self._config, self._rest = checkpoint, family, config, rest
        number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == family.architecture)
        self._names = get_tensor_name_map(number, config.num_hidden_layers)

    @cached_property
    def left_out(self) -> bool:
        """Whether scales of an FP8 cache are left out."""
        return any(name.endswith(KV_SCALES) for name in self._checkpoint.tensors)

    @cached_property
    def entries(self) -> list[Entry]:
        """All tensors, in the order of the file."""
        stacks: dict[str, list[tuple[int, str]]] = {}
        for source in self._checkpoint.tensors:
            if not source.endswith((*KV_SCALES, ROTARY_TABLE)):
                found = EXPERT.fullmatch(source)
                stacks.setdefault(self._name(source, found), []).append(
                    (int(found["number"]) if found else -1, source)
                )
        entries = [self._entry(name, [source for _, source in sorted(some)]) for name, some in stacks.items()]
        return sorted(entries, key=lambda entry: _place(entry.name))

    def _name(self, source: str, expert: re.Match[str] | None) -> str:
        asked = f"{expert['before']}.{expert['after']}" if expert else source
        quantized = source in self._checkpoint.modules
        name = self._names.get_name(
            f"{asked}.weight" if quantized else asked, try_suffixes=(".weight", ".bias")
        )
        if name is None:
            raise CheckpointError(f"llama.cpp's {self._family.architecture} has no place for {source}")
        return name if not quantized or name.endswith(".weight") else f"{name}.weight"

    def _entry(self, name: str, sources: list[str]) -> Entry:
        shapes = {self._checkpoint.shape(source) for source in sources}
        kinds = {self._kind(source, name) for source in sources}
        if len(shapes) > 1 or len(kinds) > 1:
            raise CheckpointError(f"the parts of {name} are not alike, and it is one tensor of a GGUF file")
        shape = next(iter(shapes))
        if name.endswith(FLAT):
            shape = tuple(size for size in shape if size != 1)
        stacked = EXPERT.fullmatch(sources[0]) is not None
        return Entry(name, tuple(sources), shape, next(iter(kinds)), stacked)

    def _kind(self, source: str, name: str) -> GGMLQuantizationType:
        if source in self._checkpoint.modules:
            scheme = self._checkpoint.schemes[source]
            kind = block_type(scheme)
            if kind is None:
                raise CheckpointError(
                    f"GGUF has no blocks for {source} in {scheme.name}; 4 and 5 bits and symmetric 8 bits have "
                    "some, in groups of 32 or a multiple"
                )
            return kind
        shape = self._checkpoint.shape(source)
        if len(shape) == 1 or 1 in shape or ROUTER in name:
            return GGMLQuantizationType.F32
        kind = REST[self._rest]
        return (
            kind if kind != GGMLQuantizationType.Q8_0 or shape[-1] % BLOCK == 0 else GGMLQuantizationType.F16
        )

    def rounds(self, entry: Entry) -> bool:
        """Whether a tensor has fewer bits than in the checkpoint, because the user asked for that."""
        return entry.kind == GGMLQuantizationType.Q8_0 and entry.sources[0] not in self._checkpoint.modules

    def pieces(self, entry: Entry) -> Iterator[Any]:
        """The bytes of a tensor as arrays, in order."""
        for source in entry.sources:
            if source in self._checkpoint.modules:
                found = self._in_order(entry, self._checkpoint.linear(source))
                for start, stop in _blocks(found):
                    yield blocks_of(source, found.rows(start, stop), entry.kind)
            else:
                for rows in self._rows(source):
                    yield self._stored(source, self._arranged(entry, rows), entry.kind)

    def numbers(self, entry: Entry) -> Iterator[Tensor]:
        """What the tensor stands for in the checkpoint, float32, piece by piece: rows (…, in)."""
        for source in entry.sources:
            if source not in self._checkpoint.modules:
                yield from (rows.float().reshape(-1, *entry.shape[1:]) for rows in self._rows(source))
                continue
            found = self._checkpoint.linear(source)
            for start, stop in _blocks(found):
                yield found.rows(start, stop).dequantize()

    def _rows(self, source: str) -> Iterator[Tensor]:
        shape = self._checkpoint.shape(source)
        whole = len(shape) == 1 or self._heads(source)
        step = shape[0] if whole else max(1, CHUNK_NUMBERS // shape[-1])
        for start in range(0, shape[0], step):
            yield self._checkpoint.rows(source, start, start + step)

    def _heads(self, name: str) -> int:
        """Into how many heads rows are rotated; 0 where they are not."""
        leaf = name.split(".")[-2]
        if not self._family.rotated or leaf not in ("q_proj", "k_proj", *self._family.rotated):
            return 0
        key = "num_attention_heads" if leaf in ("q_proj", "attn_q") else "num_key_value_heads"
        return int(getattr(self._config, key))

    def _in_order(self, entry: Entry, found: Quantized) -> Quantized:
        heads = self._heads(entry.name)
        if not heads:
            return found
        order = rotated(torch.arange(len(found.codes)), heads)
        return Quantized(
            found.codes[order], {key: value[order] for key, value in found.params.items()}, found.scheme
        )

    def _arranged(self, entry: Entry, rows: Tensor) -> Tensor:
        heads = self._heads(entry.name)
        values = rotated(rows, heads) if heads else rows
        if entry.name.endswith("norm.weight"):
            return values.float() + self._family.norm_offset
        return values

    def _stored(self, source: str, values: Tensor, kind: GGMLQuantizationType) -> Any:
        wide = values.float().contiguous()
        if kind == GGMLQuantizationType.F16 and float(wide.abs().max()) > HALF_MAX:
            raise CheckpointError(f"{source} has numbers beyond float16; give --rest bf16")
        stored: Any = quants.quantize(wide.numpy(), kind)
        return stored


def _blocks(linear: Quantized) -> Iterator[tuple[int, int]]:
    """Rows that are taken at once."""
    step = max(1, CHUNK_NUMBERS // linear.codes.shape[1])
    yield from ((start, start + step) for start in range(0, len(linear.codes), step))


def rotated(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head as llama.cpp rotates them: number i beside number i + half."""
    half = len(rows) // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _place(name: str) -> tuple[int, str]:
    """Where a tensor lies in the file: what is before the layers, layers by number, what is behind them."""
    layer = re.match(r"blk\.(\d+)\.", name)
    if layer:
        return int(layer[1]) + 1, name
    return (0, name) if name.startswith("token_embd") else (1 << 30, name)
