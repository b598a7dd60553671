"""MLX's affine quantization, as mlx-lm's models are: packed codes with a scale and a bias for each group.

`w = scale · q + bias` with unsigned codes q: ours with their zero points, so that bias = −scale · zero. A linear is
`weight` (out, in · bits / 32) uint32, lowest bits first, `scales` and `biases` (out, in / group) in the model's type.
`quantization` of config.json has the group size and bits of most linears, and of the others by their names. MLX has
groups of 32, 64 and 128; larger ones, and channels, are repeated. mlx-lm keeps the experts of a layer in one tensor
for each projection, and so are they written.

A symmetric zero point is a power of two, so that its biases are exact; of others they need more digits than bfloat16
has, and are refused. MLX computes in the type of the scales, so all of a model must have one.
Source: mlx 0.32 (`affine_dequantize` in ops.cpp), mlx-lm 0.32 (`load_model` in utils.py); held against both by
benchmarks/formats/mlx_layout.py.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit_core.errors import CheckpointError
from lowbit_core.model_shape import shape_from_config
from lowbit_quantize.export.checkpoint import Checkpoint
from lowbit_quantize.export.exporter import Exported
from lowbit_quantize.export.older_format import KV_SCALES
from lowbit_quantize.export.packing import pack_last
from lowbit_quantize.run.companions import copy_companions
from lowbit_quantize.run.directory import check_disk
from lowbit_quantize.run.writer import CheckpointWriter
from lowbit_quantize.schemes.scheme import Quantized, Scheme

GROUP_SIZES = (128, 64, 32)
BITS = (4, 8)
# Families whose experts mlx-lm stacks under these names, and how it calls their projections.
STACKED: dict[str, dict[str, str]] = {
    "glm4_moe": {},
    "mixtral": {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"},
    "olmoe": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
}
EXPERT = re.compile(r"(?P<before>.+)\.experts\.(?P<number>\d+)\.(?P<projection>\w+)")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Mlx:
    """The target `mlx`."""

    name = "mlx"
    readers = "mlx-lm, mlx-swift and LM Studio on Apple's chips"
    one_file = False

    def supports(self, checkpoint: Checkpoint) -> str | None:
        if not checkpoint.modules:
            return "it holds quantized linears only, and this checkpoint has none"
        family = checkpoint.manifest.base.model_type
        if checkpoint.manifest.experts is not None and family not in STACKED:
            return f"mlx-lm stacks experts under other names: this Lowbit knows {', '.join(STACKED)}, not {family}"
        if _dtype(checkpoint) not in DTYPES:
            return f"MLX computes in the model's type, bfloat16 or float16, and this one has {_dtype(checkpoint)}"
        for name, scheme in checkpoint.schemes.items():
            if scheme.bits not in BITS or scheme.code_dtype.is_floating_point:
                return f"it holds integers of 4 and 8 bits, and {name} is stored as {scheme.name}"
            if _group_size(scheme, checkpoint.shape(name)[1]) is None:
                return f"it has groups of 32, 64 and 128, and {name} has {scheme.group_size or 'channels'}"
        return None

    def write(self, checkpoint: Checkpoint, out: Path) -> Exported:
        check_disk(out, checkpoint.manifest.size.bytes)
        writer, packed, left_out = CheckpointWriter(out, len(checkpoint.shards)), 0, False
        dtype, kinds = DTYPES[_dtype(checkpoint)], dict[str, dict[str, Any]]()
        projections = STACKED.get(checkpoint.manifest.base.model_type, {})
        for shard in checkpoint.shards:
            tensors: dict[str, Tensor] = {}
            for name, found in checkpoint.read(shard):
                if isinstance(found, Quantized):
                    parts = pack(name, found, dtype)
                    packed += sum(part.nbytes for part in parts.values())
                    tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
                    kinds[place_of(name, projections)] = _kind(found.scheme, found.codes.shape[1])
                elif name.endswith(KV_SCALES):
                    left_out = True
                else:
                    tensors[name] = found
            writer.write_shard(stacked(tensors, projections))
        quantization = quantization_of(kinds)
        writer.finish(
            {**checkpoint.config, "quantization": quantization, "quantization_config": quantization}
        )
        copy_companions(checkpoint.directory, checkpoint.other_files, out)
        return Exported(writer.tensor_bytes, packed, ["scales of an FP8 KV cache"] if left_out else [])


def pack(name: str, quantized: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
    """A linear's tensors; raises CheckpointError where a scale or a bias is none of the type."""
    scheme, codes, scale = quantized.scheme, quantized.codes, quantized.params["scale"].float()
    bits, inputs = int(scheme.bits), codes.shape[1]
    lowest = -(1 << (bits - 1))
    zero = quantized.params.get("zero", torch.zeros_like(scale)).float() - lowest  # of unsigned codes
    size = _group_size(scheme, inputs)
    assert size is not None
    return {
        "weight": pack_last(codes.int() - lowest, bits).view(torch.uint32),
        "scales": _exact(name, "scales", scale, dtype, inputs // size),
        "biases": _exact(name, "biases", -scale * zero, dtype, inputs // size),
    }


def place_of(name: str, projections: Mapping[str, str]) -> str:
    """Where mlx-lm has a module: an expert in the stack of its layer, any other under its own name."""
    if not (expert := EXPERT.fullmatch(name)):
        return name
    return f"{expert['before']}.switch_mlp.{projections.get(expert['projection'], expert['projection'])}"


def stacked(tensors: Mapping[str, Tensor], projections: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a shard, those of experts in stacks, (experts, …); a layer's lie in one shard."""
    found: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if expert := EXPERT.fullmatch(module):
            place = f"{place_of(module, projections)}.{part}"
            experts.setdefault(place, {})[int(expert["number"])] = tensor
        else:
            found[name] = tensor
    for place, parts in experts.items():
        rows = [parts[number] for number in range(len(parts))]
        words = rows[0].dtype == torch.uint32  # which torch stacks as signed ones only
        found[place] = torch.stack([row.view(torch.int32) if words else row for row in rows])
        if words:
            found[place] = found[place].view(torch.uint32)
    return found


def quantization_of(kinds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What most linears are, and what each of the others is; those without scales stay as they are."""
    most = Counter(str(kind) for kind in kinds.values()).most_common(1)[0][0]
    default = next(kind for kind in kinds.values() if str(kind) == most)
    return {**default, **{name: kind for name, kind in sorted(kinds.items()) if kind != default}}


def _kind(scheme: Scheme, inputs: int) -> dict[str, Any]:
    return {"group_size": _group_size(scheme, inputs), "bits": int(scheme.bits), "mode": "affine"}


def _group_size(scheme: Scheme, inputs: int) -> int | None:
    """The largest of MLX's that divides ours."""
    return next((size for size in GROUP_SIZES if scheme.width(inputs) % size == 0), None)


def _dtype(checkpoint: Checkpoint) -> str:
    return str(shape_from_config(checkpoint.config).dtype)


def _exact(name: str, what: str, values: Tensor, dtype: torch.dtype, groups: int) -> Tensor:
    """(out, groups) in the type, each repeated as often as MLX's groups are smaller than ours."""
    rounded = values.to(dtype)
    if wrong := int(((rounded.float() != values) | ~torch.isfinite(rounded)).sum()):
        kind = str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{wrong} of {values.numel()} {what} of {name} are no {kind}, the type that MLX would compute in, so that "
            "other numbers would come out; quantize with W4A16 or W8A16"
        )
    return rounded.repeat_interleave(groups // values.shape[1], dim=1)
