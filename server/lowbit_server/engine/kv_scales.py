"""Proof that the running engine uses the checkpoint's KV-cache scales.

Engines have been seen to ignore such scales silently and to run an FP8 cache with a scale of 1, which costs
quality without any line in the log. So the server reads the scales twice, from the safetensors files and from
the attention layers of the running engine, and serves only if they are the same float32 numbers.

The safetensors format is read here (8 bytes of length, JSON, raw tensors): a few scalars need no tensor library.
"""

import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from lowbit_core.errors import CheckpointError, EngineError

SCALE_NAME = re.compile(r"\blayers\.(\d+)\..*\b([kv])_scale$")
# vLLM's loaders for AutoAWQ and AutoGPTQ have no KV-cache method: the cache runs with a scale of 1.
METHODS_WITHOUT_KV_SCALES = ("awq", "awq_marlin", "gptq", "gptq_marlin")


@dataclass(frozen=True)
class KVScale:
    """The scales of one layer: stored value × scale = key or value."""

    layer: int
    k_scale: float
    v_scale: float


@dataclass(frozen=True)
class KVProof:
    """Scales in force: the `checkpoint`'s, `unit` where the format has none, `unused` without an FP8 cache."""

    scales: Literal["checkpoint", "unit", "unused"]
    layers: int


def read_checkpoint_scales(directory: Path) -> dict[int, KVScale]:
    """The KV scales in a checkpoint's safetensors files by layer; empty where there are none."""
    found: dict[int, dict[str, float]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            for layer, side, value in _scales_in(file, path):
                found.setdefault(layer, {})[side] = value
    for layer, sides in found.items():
        if sides.keys() != {"k", "v"}:
            raise CheckpointError(
                f"{directory}: layer {layer} has only one of k_scale and v_scale; quantize it again"
            )
    return {layer: KVScale(layer, found[layer]["k"], found[layer]["v"]) for layer in sorted(found)}


def tensor_names(directory: Path) -> Iterator[str]:
    """The names of all tensors in a checkpoint's safetensors files, from their headers."""
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            yield from _header(file, path)[0]


def _header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the offset at which its tensors begin."""
    try:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    except (struct.error, ValueError, MemoryError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    return header, 8 + header_bytes


def _scales_in(file: BinaryIO, path: Path) -> Iterator[tuple[int, str, float]]:
    header, begin = _header(file, path)
    for name, entry in header.items():
        if match := SCALE_NAME.search(name):
            file.seek(begin + entry["data_offsets"][0])
            raw = file.read(entry["data_offsets"][1] - entry["data_offsets"][0])
            yield int(match[1]), match[2], max(_decode(raw, entry["dtype"], name))


def _decode(raw: bytes, dtype: str, name: str) -> Sequence[float]:
    if dtype == "BF16":  # the upper half of a float32
        raw = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
        dtype = "F32"
    letters = {"F32": ("f", 4), "F16": ("e", 2), "F64": ("d", 8)}
    if dtype not in letters or not raw:
        raise CheckpointError(f"{name} has dtype {dtype} and {len(raw)} bytes; a KV scale is a float")
    letter, size = letters[dtype]
    return struct.unpack(f"<{len(raw) // size}{letter}", raw)


def prove_kv_scales(
    checkpoint: Mapping[int, KVScale], engine: Sequence[KVScale], *, kv_dtype: str, quant_method: str | None
) -> KVProof:
    """Compare the scales of the files with those of the running layers.

    Raises EngineError when an FP8 cache runs with other scales than the checkpoint has.
    """
    if not kv_dtype.startswith("fp8"):
        return KVProof("unused", len(engine))
    ignored = quant_method in METHODS_WITHOUT_KV_SCALES
    expected = {} if ignored else checkpoint
    for running in engine:
        _require_equal(expected.get(running.layer, KVScale(running.layer, 1.0, 1.0)), running)
    missing = sorted(set(expected) - {running.layer for running in engine})
    if missing:
        raise EngineError(f"the engine reports no KV scales for layers {missing}, which the checkpoint has")
    return KVProof("checkpoint" if expected else "unit", len(engine))


def _require_equal(expected: KVScale, running: KVScale) -> None:
    pairs = (("k", expected.k_scale, running.k_scale), ("v", expected.v_scale, running.v_scale))
    for side, in_file, in_engine in pairs:
        if _float32(in_file) != _float32(in_engine):
            raise EngineError(
                f"layer {running.layer}: the engine runs with {side}_scale {in_engine:.9g}, the checkpoint "
                f"says {in_file:.9g}; its quality would be lower than was measured, so it is not served"
            )


def _float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def scales_from_workers(reports: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[KVScale, ...]:
    """The scales of all workers' layers in order; raises EngineError where two workers disagree on a layer."""
    layers: dict[int, KVScale] = {}
    for layer in (layer for report in reports for layer in report):
        scale = KVScale(layer["layer"], layer["k_scale"], layer["v_scale"])
        if layers.setdefault(scale.layer, scale) != scale:
            raise EngineError(f"two workers hold different KV scales for layer {scale.layer}: {scale}")
    return tuple(layers[number] for number in sorted(layers))
