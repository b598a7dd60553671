"""Proof that the running engine uses the checkpoint's KV-cache scales.

Engines have been seen to ignore such scales silently and to run an FP8 cache with a scale of 1, which costs
quality without any line in the log. So the server reads the scales twice, from the safetensors files and from
the attention layers of the running engine, and serves only if they are the same float32 numbers.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowbit_core.errors import CheckpointError, EngineError
from lowbit_server.engine.stored_numbers import as_float32, stored_numbers

SCALE_NAME = re.compile(r"\blayers\.(\d+)\..*\b([kv])_scale$")
# vLLM's loaders for AutoAWQ and AutoGPTQ have no KV-cache method: the cache runs with a scale of 1.
METHODS_WITHOUT_KV_SCALES = ("awq", "awq_marlin", "gptq", "gptq_marlin")


Scale = float | tuple[float, ...]  # of a layer, or of each of its heads


@dataclass(frozen=True)
class KVScale:
    """The scales of one layer, or of its heads: stored value × scale = key or value; without `fp8` it runs without."""

    layer: int
    k_scale: Scale
    v_scale: Scale
    fp8: bool = True


@dataclass(frozen=True)
class KVProof:
    """Scales in force: the `checkpoint`'s, `unit` where the format has none, `unused` without an FP8 cache."""

    scales: Literal["checkpoint", "unit", "unused"]
    layers: int


def read_checkpoint_scales(directory: Path) -> dict[int, KVScale]:
    """The KV scales in a checkpoint's safetensors files by layer; empty where there are none."""
    found: dict[int, dict[str, Scale]] = {}
    for match, values in stored_numbers(directory, SCALE_NAME):
        found.setdefault(int(match[1]), {})[match[2]] = values[0] if len(values) == 1 else tuple(values)
    for layer, sides in found.items():
        if sides.keys() != {"k", "v"}:
            raise CheckpointError(
                f"{directory}: layer {layer} has only one of k_scale and v_scale; quantize it again"
            )
    return {layer: KVScale(layer, found[layer]["k"], found[layer]["v"]) for layer in sorted(found)}


def prove_kv_scales(
    checkpoint: Mapping[int, KVScale],
    engine: Sequence[KVScale],
    *,
    quant_method: str | None,
    skipped: Collection[int] = (),
) -> KVProof:
    """Compare the scales of the files with those of the running layers; `skipped` are to run without FP8.

    Raises EngineError when an FP8 cache runs with other scales than the checkpoint has, or in other layers.
    """
    in_fp8 = [running for running in engine if running.fp8]
    if not in_fp8:
        return KVProof("unused", len(engine))
    ignored = quant_method in METHODS_WITHOUT_KV_SCALES
    expected = {} if ignored else {layer: one for layer, one in checkpoint.items() if layer not in skipped}
    for running in in_fp8:
        if running.layer in skipped:
            raise EngineError(
                f"layer {running.layer}: the engine keeps its keys and values in FP8, the checkpoint was measured "
                "without; its quality would be lower, so it is not served"
            )
        _require_equal(expected.get(running.layer, KVScale(running.layer, 1.0, 1.0)), running)
    missing = sorted(set(expected) - {running.layer for running in in_fp8})
    if missing:
        raise EngineError(
            f"the engine runs layers {missing} without an FP8 cache, for which the checkpoint has scales"
        )
    return KVProof("checkpoint" if expected else "unit", len(in_fp8))


def _require_equal(expected: KVScale, running: KVScale) -> None:
    pairs = (("k", expected.k_scale, running.k_scale), ("v", expected.v_scale, running.v_scale))
    for side, in_file, in_engine in pairs:
        if not _agree(in_file, in_engine):
            raise EngineError(
                f"layer {running.layer}: the engine runs with {side}_scale {_words(in_engine)}, the checkpoint "
                f"says {_words(in_file)}; its quality would be lower than was measured, so it is not served"
            )


def _agree(in_file: Scale, in_engine: Scale) -> bool:
    """Whether they are the same float32 numbers. Ranks that are more than the heads hold the same head in turn."""
    stored, running = (
        [as_float32(one) for one in ((scale,) if isinstance(scale, float) else scale)]
        for scale in (in_file, in_engine)
    )
    times = max(1, len(running) // len(stored))
    return running == [one for one in stored for _ in range(times)]


def _words(scale: Scale) -> str:
    return f"{scale:.9g}" if isinstance(scale, float) else " ".join(f"{one:.9g}" for one in scale)


def scales_from_workers(reports: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[KVScale, ...]:
    """The scales of all workers' layers in order; raises EngineError where two workers disagree on a layer.

    Each worker has the scales of its own heads: these are joined in the order of the workers.
    """
    layers: dict[int, KVScale] = {}
    for layer in (layer for report in reports for layer in report):
        fp8 = layer["kv_dtype"].startswith("fp8")
        scale = KVScale(layer["layer"], _read(layer["k_scale"]), _read(layer["v_scale"]), fp8)
        before = layers.get(scale.layer)
        if before is not None and isinstance(scale.k_scale, tuple):
            scale = KVScale(
                scale.layer,
                _joined(before.k_scale, scale.k_scale),
                _joined(before.v_scale, scale.v_scale),
                fp8,
            )
        elif before not in (None, scale):
            raise EngineError(f"two workers hold different KV scales for layer {scale.layer}: {scale}")
        layers[scale.layer] = scale
    return tuple(layers[number] for number in sorted(layers))


def _read(reported: Any) -> Scale:
    """What a worker's plain JSON says."""
    return tuple(reported) if isinstance(reported, list) else float(reported)


def _joined(first: Scale, second: Scale) -> tuple[float, ...]:
    some, others = (scale if isinstance(scale, tuple) else (scale,) for scale in (first, second))
    return (*some, *others)
