"""The weights that a checkpoint stands for, in float32, whichever of four formats it is in.

compressed-tensors' `pack-quantized` and its formats of eight bits, AutoGPTQ's format (GPTQModel writes it too) and
AutoAWQ's GEMM format are unpacked here from what is on disk, so that no tool judges its own result: weight =
(code - zero) * scale, with one scale and zero for each group of inputs. Knows torch and safetensors alone.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that each nibble of AutoAWQ's words holds
PACKED = ("weight_packed", "qweight")
FOUR_BIT_FLOATS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantized(checkpoint: Path) -> Tensors:
    """Every weight of `checkpoint` by the name that it has in the base model."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    quantization = config.get("quantization_config", {})
    tensors: Tensors = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        tensors.update(load_file(path))
    linears: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        owner, _, part = name.rpartition(".")
        linears.setdefault(owner, {})[part] = tensor
    weights: Tensors = {}
    for owner, parts in linears.items():
        if any(part in parts for part in PACKED):
            weights[f"{owner}.weight"] = unpacked(parts, quantization)
        elif (
            "weight_scale" in parts
        ):  # eight bits: codes as they are, a scale a channel, a block or one for all
            codes = parts["weight"].float()
            weights[f"{owner}.weight"] = in_blocks(codes, of_blocks(scales_of(parts), codes.shape))
        elif "weight" in parts:
            weights[f"{owner}.weight"] = parts["weight"].float()
        if "bias" in parts:
            weights[f"{owner}.bias"] = parts["bias"].float()
    return weights


def unpacked(parts: Tensors, quantization: dict[str, Any]) -> torch.Tensor:
    """(out, in) float32"""
    if "weight_packed" in parts and parts["weight_packed"].dtype == torch.uint8:
        return from_four_bit_floats(parts)
    if "weight_packed" in parts:
        return from_compressed_tensors(parts)
    if quantization["quant_method"] == "awq":
        return from_awq(parts, quantization["bits"])
    return from_gptq(parts, quantization["bits"], quantization.get("checkpoint_format", "gptq") == "gptq")


def fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The unsigned `bits`-wide fields of int32 words, lowest first; a new last dimension of 32 / bits."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int64)
    return (words.long().unsqueeze(-1) >> shifts) & (2**bits - 1)


def of_blocks(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The scale of each number of a weight (out, in) where 128 x 128 share one; of rows and of all as they are."""
    if scale.dim() < 2 or scale.numel() == 1 or len(scale) == shape[0]:
        return scale
    return scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]


def dense_fields(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` unsigned numbers of `bits` bits in int32 words, (rows, count), of which one may lie in two."""
    place = torch.arange(count) * bits
    word, shift = place // 32, place % 32
    unsigned = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    return ((unsigned[:, word] | unsigned[:, word + 1] << 32) >> shift) & (2**bits - 1)


def from_compressed_tensors(parts: Tensors) -> torch.Tensor:
    """Words run along the inputs, those of zero points along the outputs; without zero points they are the middle."""
    outputs, inputs = parts["weight_shape"].tolist()
    scales = parts["weight_scale"].float()  # (out, groups)
    bits = 32 * parts["weight_packed"].shape[1] // inputs
    codes = dense_fields(parts["weight_packed"], bits, inputs)  # (out, in)
    zeros = torch.full_like(scales, 2 ** (bits - 1))
    if "weight_zero_point" in parts:
        zeros = dense_fields(parts["weight_zero_point"].T, bits, outputs).T  # (out, groups)
    group = torch.arange(inputs) // (inputs // scales.shape[1])
    if "weight_g_idx" in parts:
        group = parts["weight_g_idx"].long()
    return (codes - zeros[:, group]) * scales[:, group]


def scales_of(parts: Tensors) -> torch.Tensor:
    """Of channels, blocks or all, float32; bytes are powers of two, and FP8 ones are divided by the tensor's own."""
    scales = parts["weight_scale"]
    if scales.dtype == torch.uint8:
        return torch.exp2(scales.float() - 127)
    return scales.float() / parts.get("weight_global_scale", torch.ones(1)).float()


def in_blocks(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes (out, in) times scales (out, blocks), of one column to as many as there are codes, or one number."""
    if scales.dim() < 2:
        return codes * scales
    return (codes.unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(-1)).flatten(1)


def from_four_bit_floats(parts: Tensors) -> torch.Tensor:
    """Two in a byte, the first in its low bits; three bits name a magnitude, the fourth is the sign."""
    halves = torch.stack((parts["weight_packed"] & 15, parts["weight_packed"] >> 4), -1).flatten(1).long()
    numbers = torch.tensor(FOUR_BIT_FLOATS)[halves & 7] * (1 - 2 * (halves >> 3))
    return in_blocks(numbers, scales_of(parts))


def from_gptq(parts: Tensors, bits: int, zeros_less_one: bool) -> torch.Tensor:
    """Words run along the inputs; zero points are stored less one in the older of two layouts."""
    codes = fields(parts["qweight"], bits).transpose(1, 2).flatten(0, 1)  # (in, out)
    zeros = fields(parts["qzeros"], bits).flatten(1) + int(zeros_less_one)  # (groups, out)
    group = parts["g_idx"].long()
    return ((codes - zeros[group]) * parts["scales"].float()[group]).T.contiguous()


def from_awq(parts: Tensors, bits: int) -> torch.Tensor:
    """Words run along the outputs, their columns interleaved."""
    order = torch.tensor(AWQ_COLUMNS).argsort()
    codes = fields(parts["qweight"], bits)[..., order].flatten(1)  # (in, out)
    zeros = fields(parts["qzeros"], bits)[..., order].flatten(1)  # (groups, out)
    scales = parts["scales"].float()
    group = torch.arange(len(codes)) // (len(codes) // len(scales))
    return ((codes - zeros[group]) * scales[group]).T.contiguous()
