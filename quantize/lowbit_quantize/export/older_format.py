"""What AutoAWQ's and AutoGPTQ's formats have in common: one kind of affine integers for all linears, repacked.

Codes and scales are the checkpoint's; only the packing differs. Neither format has a place for the scales of an FP8
cache.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit_quantize.export.checkpoint import Checkpoint
from lowbit_quantize.export.exporter import Exported
from lowbit_quantize.run.companions import copy_companions
from lowbit_quantize.run.directory import check_disk
from lowbit_quantize.run.writer import CheckpointWriter, write_json
from lowbit_quantize.schemes.integer import Integer
from lowbit_quantize.schemes.scheme import Quantized

KERNEL_GROUP_SIZES = (32, 64, 128)  # what vLLM's GPU code takes in the older formats
OUTPUT_MULTIPLE = 32  # AutoAWQ, AutoGPTQ and vLLM's CPU kernel count outputs in blocks of 32
KV_SCALES = ("k_scale", "v_scale")
HEAD = "lm_head"


def scheme_of(checkpoint: Checkpoint) -> Integer:
    """The one scheme of a checkpoint that has passed `obstacle`."""
    scheme = next(iter(checkpoint.schemes.values()))
    assert isinstance(scheme, Integer)
    return scheme


def obstacle(checkpoint: Checkpoint, bits: tuple[int, ...], *, asymmetric: bool) -> str | None:
    """Why no engine would read a checkpoint's linears in such a format; None where one would."""
    kinds = list(dict.fromkeys(checkpoint.schemes.values()))
    if checkpoint.manifest.experts is not None:
        return "the format is for dense models and this one has experts"
    if HEAD in checkpoint.modules:
        return f"its readers keep the head as it is, and this checkpoint quantizes {HEAD}"
    if not kinds:
        return "it holds quantized linears only, and this checkpoint has none"
    if len(kinds) > 1:
        mix = ", ".join(f"{kind.name} in groups of {kind.group_size or 'channels'}" for kind in kinds)
        return f"it holds one scheme for all linears, and this checkpoint has {mix}"
    scheme = kinds[0]
    if not isinstance(scheme, Integer) or scheme.bits not in bits:
        return f"it holds integers of {' or '.join(map(str, bits))} bits, not {scheme.name}"
    if not scheme.symmetric and not asymmetric:
        return "vLLM refuses asymmetric linears in it; quantize with a symmetric scheme"
    if scheme.group_size not in KERNEL_GROUP_SIZES:
        allowed = ", ".join(map(str, KERNEL_GROUP_SIZES))
        return f"vLLM reads it in groups of {allowed} only, not {scheme.group_size or 'channels'}"
    return None


def repack(
    checkpoint: Checkpoint,
    out: Path,
    pack: Callable[[Quantized], dict[str, Tensor]],
    quantization: Mapping[str, Any],
    tool_file: str | None = None,
) -> Exported:
    """Write every shard with its linears packed anew, and the configuration; `tool_file` gets a copy of its part."""
    check_disk(out, checkpoint.manifest.size.bytes)
    writer, packed_bytes, left_out = CheckpointWriter(out, len(checkpoint.shards)), 0, False
    for shard in checkpoint.shards:
        tensors: dict[str, Tensor] = {}
        for name, found in checkpoint.read(shard):
            if isinstance(found, Quantized):
                packed = pack(found)
                packed_bytes += sum(tensor.nbytes for tensor in packed.values())
                tensors.update({f"{name}.{part}": tensor for part, tensor in packed.items()})
            elif name.endswith(KV_SCALES):
                left_out = True
            else:
                tensors[name] = found
        writer.write_shard(tensors)
    writer.finish({**checkpoint.config, "quantization_config": dict(quantization)})
    copy_companions(checkpoint.directory, checkpoint.other_files, out)
    if tool_file:
        write_json(out / tool_file, quantization)
    return Exported(writer.tensor_bytes, packed_bytes, ["scales of an FP8 KV cache"] if left_out else [])


def odd_outputs(checkpoint: Checkpoint) -> str | None:
    """Why some linear's outputs cannot be packed; None where all can. Reads the shards."""
    for shard in checkpoint.shards:
        for name, found in checkpoint.read(shard):
            if isinstance(found, Quantized) and len(found.codes) % OUTPUT_MULTIPLE:
                return f"it packs outputs in blocks of {OUTPUT_MULTIPLE} and {name} has {len(found.codes)}"
    return None
