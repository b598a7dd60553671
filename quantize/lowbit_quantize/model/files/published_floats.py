"""Bases that are published in FP8 or MXFP4: each weight is dequantized exactly while it is read.

Three layouts are known: 8-bit floats with one scale a tensor, a row or a block (`weight_scale_inv` of DeepSeek-AI 2024,
arXiv 2412.19437, and compressed-tensors' `weight_scale`), and 4-bit floats of 32 with a power of two (OCP Microscaling
Formats 1.0, 2023), as compressed-tensors packs them and as gpt-oss does (`_blocks`, `_scales`). The product of a value
and its scale is made in float32, which holds it exactly for scales of up to 16 significant bits.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit_core.errors import ModelError
from lowbit_quantize.model.weights import WeightFiles

FP8 = ("F8_E4M3", "F8_E5M2")
SCALES = ("weight_scale_inv", "weight_scale")  # of a weight, by their names beside it
BESIDE = ("input_scale", "activation_scale", "output_scale", "k_scale", "v_scale", "q_scale", "weight_shape")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MX_GROUP = 32
COMPRESSED_FP8 = ("float-quantized", "naive-quantized")
COMPRESSED_MXFP4 = "mxfp4-pack-quantized"
READ = "FP8 in blocks, rows or tensors, and MXFP4 are dequantized while they are read; others are not"


@dataclass(frozen=True)
class PublishedFloats:
    """What a base's `quantization_config` says of its numbers; `block` is of FP8 in blocks, (rows, columns)."""

    method: str
    block: tuple[int, int] | None = None

    @property
    def words(self) -> str:
        """For manifests and logs."""
        return f"{self.method} in blocks of {self.block[0]} x {self.block[1]}" if self.block else self.method


@dataclass(frozen=True)
class Stored:
    """How a weight lies in the files: its values, their scales, and its shape when it is dequantized."""

    values: str
    scales: str
    shape: tuple[int, ...]
    packed: bool = False

    def read(self, files: WeightFiles, floats: PublishedFloats, row: int | None = None) -> Tensor:
        """The weight, or one entry of its first dimension, in float32."""
        values, scales = files.read(self.values, row), _whole_scale(files, self.scales, row)
        return from_mxfp4(values, scales) if self.packed else from_fp8(values, scales, floats.block)


def published_floats(quantization: Mapping[str, Any], name: str) -> PublishedFloats:
    """What can be read of a base that is published quantized; raises ModelError with the reason for all others."""
    method = str(quantization.get("quant_method", "unknown"))
    if method == "fp8":
        block = quantization.get("weight_block_size")
        return PublishedFloats("FP8", _block(block, name) if block else None)
    if method == "mxfp4":
        return PublishedFloats("MXFP4")
    if method == "compressed-tensors":
        return _compressed(quantization, name)
    raise ModelError(f"{name} is already quantized ({method}); give the unquantized model ({READ})")


def _compressed(quantization: Mapping[str, Any], name: str) -> PublishedFloats:
    formats = {str(quantization.get("format"))} - {"None", "mixed-precision"}
    groups = [
        group for group in (quantization.get("config_groups") or {}).values() if isinstance(group, Mapping)
    ]
    formats |= {str(group["format"]) for group in groups if group.get("format")}
    weights = [group.get("weights") or {} for group in groups]
    if formats == {COMPRESSED_MXFP4}:
        return PublishedFloats("MXFP4")
    floats = all((args.get("type"), args.get("num_bits")) == ("float", 8) for args in weights)
    if formats and formats <= set(COMPRESSED_FP8) and floats:
        blocks = {tuple(args["block_structure"]) for args in weights if args.get("block_structure")}
        if len(blocks) > 1:
            raise ModelError(f"{name} is FP8 in blocks of several sizes; give the unquantized model")
        return PublishedFloats("FP8", _block(next(iter(blocks)), name) if blocks else None)
    what = "+".join(sorted(formats)) or "unknown"
    if "pack-quantized" in formats:
        raise ModelError(
            f"{name} is published in integers of few bits (compressed-tensors {what}), and often trained so: to round "
            f"them again only loses, so serve it as it is, or give its unquantized model ({READ})"
        )
    raise ModelError(
        f"{name} is already quantized (compressed-tensors {what}); give the unquantized model ({READ})"
    )


def _block(given: Any, name: str) -> tuple[int, int]:
    sizes = tuple(given) if isinstance(given, list | tuple) else ()
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise ModelError(
            f"{name}: FP8 in blocks of {given!r}; blocks have a number of rows and one of columns"
        )
    return sizes[0], sizes[1]


def stored(files: WeightFiles, weight: str) -> Stored | None:
    """How the files hold `weight` in FP8 or MXFP4; None where they do not."""
    module = weight.removesuffix(".weight")
    if weight in files and files.dtype(weight) in FP8:
        beside = [f"{module}.{scale}" for scale in SCALES] + [
            f"{weight}_{scale}" for scale in ("scale_inv", "scale")
        ]
        scales = next((name for name in beside if name in files), None)
        return Stored(weight, scales, files.shape(weight)) if scales else None
    packed, scales = f"{module}.weight_packed", f"{module}.weight_scale"
    if packed in files and scales in files and files.dtype(packed) == files.dtype(scales) == "U8":
        *rows, pairs = files.shape(packed)
        return Stored(packed, scales, (*rows, 2 * pairs), packed=True)
    for blocks, scales in (
        (f"{weight}_blocks", f"{weight}_scales"),
        (f"{module}_blocks", f"{module}_scales"),
    ):
        if blocks in files and scales in files:
            *rows, groups, pairs = files.shape(blocks)
            return Stored(blocks, scales, (*rows, groups * 2 * pairs), packed=True)
    return None


def beside(files: Collection[str], weight: str) -> list[str]:
    """What has no meaning any more when a weight is dequantized: scales of activations and of caches."""
    module = weight.removesuffix(".weight")
    return [name for scale in (*BESIDE, *SCALES) if (name := f"{module}.{scale}") in files]


def from_fp8(values: Tensor, scales: Tensor, block: tuple[int, int] | None) -> Tensor:
    """8-bit floats (..., rows, columns) times one scale, one a row, or one a block: float32."""
    wide, scales = values.to(torch.float32), scales.to(torch.float32)
    if scales.numel() == 1:
        return wide * scales.reshape(())
    rows, columns = wide.shape[-2:]
    if scales.shape[-2:] == (rows, 1):
        return wide * scales
    if scales.shape == (rows,):
        return wide * scales.unsqueeze(-1)
    if block is None or scales.shape[-2:] != (-(-rows // block[0]), -(-columns // block[1])):
        raise ModelError(
            f"an FP8 weight of {tuple(values.shape)} has scales of {tuple(scales.shape)}, which its configuration "
            f"(blocks of {block}) does not explain; give the unquantized model"
        )
    spread = scales.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[
        ..., :columns
    ]
    return wide * spread


def from_mxfp4(packed: Tensor, scales: Tensor) -> Tensor:
    """Pairs of 4-bit floats, the first in the low half, and exponents of groups of 32: float32 (..., rows, columns).

    `packed` is (..., columns / 2), or (..., columns / 32, 16) as gpt-oss has it; `scales` (..., columns / 32).
    """
    table = torch.tensor([*E2M1, *(-value for value in E2M1)])
    flat = packed.flatten(-2) if packed.dim() > scales.dim() else packed
    values = torch.stack((table[(flat & 15).long()], table[(flat >> 4).long()]), -1).flatten(-2)
    groups = values.unflatten(-1, (-1, MX_GROUP))
    return torch.ldexp(groups, scales.to(torch.int32).unsqueeze(-1) - 127).flatten(-2)


def _whole_scale(files: WeightFiles, name: str, row: int | None) -> Tensor:
    """Scales of a stacked tensor are stacked as well, unless one holds for all."""
    shape = files.shape(name)
    return files.read(name, row if row is not None and len(shape) > 1 and shape[0] > 1 else None)
