"""Kernels of torch and of vLLM, given a checkpoint's own tensors, against what our dequantization says they compute.

A wrong layout gives another product altogether; a right one differs by the roundings of its output and, in W4A16, of
each weight to bfloat16. What has no kernel here says why, and where none has one the section is skipped.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from benchmarks.gpu import seams
from benchmarks.gpu.place import Place
from benchmarks.gpu.report import Found
from benchmarks.gpu.vllm_linear import NoKernel, vllm_product
from torch import Tensor
from torch.nn import functional

SCHEMES = ("W4A16", "FP8_BLOCK", "NVFP4A16")
ERROR = 1e-2  # relative
TOKENS = 64
OUTPUTS, INPUTS = 4096, 4096
INNER_TILES = 8  # of torch's int4 layout
INT4_ZERO = 8  # the code that stands for 0 in torch's int4


Product = Callable[[Any, Tensor], Tensor]  # a quantized linear and (tokens, in) to (tokens, out)


def kernel(name: str, kernels: Mapping[str, Product] | None = None) -> Callable[[Place], Found]:
    """The section of a scheme: the error of each kernel that there is.

    `kernels` are those of torch and of vLLM where none are given, by their maker.
    """

    def run(place: Place) -> Found:
        outputs, inputs = (256, 512) if place.tiny else (OUTPUTS, INPUTS)
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        read = torch.randn(TOKENS, inputs, generator=generator).bfloat16().to(place.device)
        linear = seams.rounded_to_nearest(name, weight.to(place.device))
        expected = seams.product(linear, read)
        values: dict[str, Any] = {}
        wrong, absent = [], []
        for maker, product in (kernels or {"torch": OF_TORCH[name], "vLLM": vllm_product}).items():
            try:
                off = float((product(linear, read).float() - expected).norm() / expected.norm())
            except NoKernel as reason:
                values[maker] = str(reason)
                absent.append(f"{maker}: {reason}")
                continue
            values[maker] = {"relative_error": off}
            if not off < ERROR:
                wrong.append(f"{maker}'s kernel is off by {off:.1e}")
        return Found(values, tuple(wrong), skipped="; ".join(absent) if len(absent) == len(values) else "")

    return run


def _int4(linear: Any, read: Tensor) -> Tensor:
    """(tokens, out) by torch's int4 products."""
    codes, scale = linear.codes.int() + INT4_ZERO, linear.params["scale"]
    group_size = codes.shape[1] // scale.shape[1]
    scales = torch.stack((scale, torch.zeros_like(scale)), -1).transpose(0, 1).contiguous().bfloat16()
    if read.device.type == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, INNER_TILES)
        of_cpu: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(read, packed, group_size, scales)
        return of_cpu
    if torch.cuda.get_device_capability() < (8, 0):
        raise NoKernel("its int4 products need a compute capability of 8.0")
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), INNER_TILES)
    output: Tensor = torch.ops.aten._weight_int4pack_mm(read, packed, group_size, scales)
    return output


def _fp8_blocks(linear: Any, read: Tensor) -> Tensor:
    """(tokens, out) by torch's FP8 products, inputs rounded in groups as the scheme says."""
    if read.device.type != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        raise NoKernel("its FP8 products in blocks are for a compute capability of 9.0")
    codes, scales = seams.rounded_inputs(linear, read)
    tensors = linear.tensors()
    of_weight = tensors["weight_scale"].float()  # (out / 128, in / 128)
    of_weight = functional.pad(of_weight, (0, -of_weight.shape[1] % 4)).t()
    of_inputs = scales.t().contiguous().t()
    kinds = functional.ScalingType
    return functional.scaled_mm(
        codes.to(torch.float8_e4m3fn),
        tensors["weight"].t(),
        of_inputs,
        kinds.BlockWise1x128,
        of_weight,
        kinds.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )


def _no_product(_linear: Any, _read: Tensor) -> Tensor:
    raise NoKernel("it has no product of NVFP4 weights and bfloat16 inputs")


OF_TORCH: dict[str, Product] = {
    "W4A16": _int4, "FP8_BLOCK": _fp8_blocks, "NVFP4A16": _no_product,
}  # fmt: skip
