"""Weights and inputs of eight bits: W8A8, FP8_DYNAMIC and FP8 of compressed-tensors.

A weight has one scale a channel (output), or one for the whole of what engines fuse (FP8). The files hold codes as they
are, in `weight`, and float32 scales, which is what kernels multiply by. Kernels multiply codes by codes, so that a
weight is rounded but once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit_quantize.device.memory import without_compiler
from lowbit_quantize.schemes.inputs import InputQuantizer
from lowbit_quantize.schemes.numbers.grids import FP8, INT8, Grid
from lowbit_quantize.schemes.processors.experts import EXPERTS
from lowbit_quantize.schemes.processors.linears import LINEARS
from lowbit_quantize.schemes.scheme import (
    ExpertSupport,
    GroupSize,
    Kernel,
    Params,
    Preset,
    QuantizeColumn,
    Quantized,
)

with without_compiler():  # the library compiles a function for 4-bit floats, which is not called here
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

INT8_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8)
FP8_CLIPS = tuple(2 ** (-step / 8) for step in range(9))  # an octave: a float grid repeats after it
FORMATS = {"int8": "int-quantized", "fp8": "float-quantized"}
OPENED_EXPERTS = ("fp8",)  # by transformers 5.19, which unpacks experts in FP8 and packed integers only
STATIC_EXPERTS = ExpertSupport(
    "nothing", misfit="engines divide what all experts of a layer read by the largest of their scales"
)
CPU_EXPERTS_MULTIPLE = 32  # of hidden and middle channels (`CPUExpertsInt8`)


@dataclass(frozen=True)
class EightBits:
    """`w = scale · code` and `x ≈ scale · code`, codes on one grid; the parameter `scale` is (out, 1)."""

    name: str
    grid: Grid
    by_channel: bool
    input_quantizer: InputQuantizer

    bits = 8
    group_size = None
    symmetric = True

    @property
    def format(self) -> str:
        return FORMATS[self.grid.name]

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8 if self.grid.name == "int8" else torch.bfloat16  # few operations take float8

    def width(self, features: int) -> int:
        return features

    def search(self, weight: Tensor, hessian: Tensor | None) -> Params:
        absmax = weight.abs().amax(-1, keepdim=True)
        widest = _scale(absmax if self.by_channel else absmax.amax(-2, keepdim=True), self.grid)
        if hessian is None:
            return self._params(widest, weight)
        cost = hessian if hessian.dim() < weight.dim() else hessian.diagonal(dim1=-2, dim2=-1)
        clips = INT8_CLIPS if self.grid.name == "int8" else FP8_CLIPS
        errors = torch.stack([self._errors(weight, widest * clip, cost) for clip in clips])
        if not self.by_channel:
            errors = errors.sum(-1, keepdim=True)
        best = torch.tensor(clips, device=weight.device)[errors.argmin(0)].unsqueeze(-1)
        return self._params(widest * best, weight)

    def quantize(self, weight: Tensor, params: Params) -> Tensor:
        return self.grid.nearest_(weight / params["scale"]).to(self.code_dtype)

    def dequantize(self, codes: Tensor, params: Params) -> Tensor:
        return codes.float() * params["scale"]

    def factors(self, codes: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        return codes.to(torch.bfloat16), params["scale"]

    def columns(self, params: Params, groups: Tensor) -> Callable[[slice], Sequence[QuantizeColumn]]:
        scale = params["scale"].squeeze(-1)  # (n, rows)

        def quantize(aim: Tensor, column: Tensor, code: Tensor, left: Tensor) -> None:
            self.grid.nearest_(torch.div(aim, scale, out=code))
            torch.addcmul(column, code, scale, value=-1, out=left)

        return lambda block: [quantize] * groups[:, block].shape[1]

    def refine(self, codes: Tensor, params: Params, weight: Tensor, hessian: Tensor) -> Params:
        """The scale that errs least for these codes, q H wᵀ / q H qᵀ of each row, or of all rows together."""
        values = codes.float()
        weighted = values @ hessian
        slope = (weighted * weight).sum(-1, keepdim=True)
        curvature = (weighted * values).sum(-1, keepdim=True)
        if not self.by_channel:
            slope, curvature = slope.sum(-2, keepdim=True), curvature.sum(-2, keepdim=True)
        fits = (slope > 0) & (curvature > 0)
        found = torch.where(fits, slope / curvature, params["scale"][..., : slope.shape[-2], :])
        return self._params(found, weight)

    def trial_error(self, weight: Tensor, blocks: Tensor) -> float:
        cost = blocks[0] if blocks.dim() == 2 else blocks[0].diagonal()
        absmax = weight.abs().amax(1, keepdim=True)
        scale = _scale(absmax if self.by_channel else absmax.amax(0, keepdim=True), self.grid)
        return float(self._errors(weight, scale, cost).sum())

    def tensors(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        scale = params["scale"] if self.by_channel else params["scale"][0]
        return {"weight": codes.to(self.grid.dtype), "weight_scale": scale.float()}

    def read(self, tensors: Mapping[str, Tensor]) -> Quantized:
        codes = tensors["weight"].to(self.code_dtype)
        scale = tensors["weight_scale"].float().view(-1, 1).expand(len(codes), 1)
        stored = tensors.get("input_scale")
        return Quantized(codes, {"scale": scale}, self, None if stored is None else float(stored))

    def bytes(self, outputs: int, inputs: int) -> tuple[int, int]:
        static = self.input_quantizer.static
        return outputs * inputs + 4 * (outputs if self.by_channel else 1) + 4 * static, 2 + static

    def quantization_args(self) -> Mapping[str, Any]:
        return {key: value for key, value in PRESET_SCHEMES[self.name].items() if key != "targets"}

    def obstacles(self, kernel: Kernel) -> list[str]:
        if kernel == "cpu" and self.input_quantizer.static:
            return ["the CPU's kernels take no static scale of FP8 inputs; FP8_DYNAMIC or W8A8 run there"]
        return []

    def multiple(self, kernel: Kernel) -> int:
        return 1  # where CUTLASS asks for multiples of 16, vLLM goes on with Triton

    @property
    def cpu_kernels(self) -> Sequence[str]:
        return LINEARS[self.name].cpu_kernels

    @property
    def gpus(self) -> str:
        return LINEARS[self.name].gpus

    @property
    def experts(self) -> ExpertSupport:
        if self.input_quantizer.static:
            return STATIC_EXPERTS
        return ExpertSupport(EXPERTS[self.name].words, opened=self.grid.name in OPENED_EXPERTS)

    def expert_obstacles(self, kernel: Kernel, hidden: int, middle: int) -> list[str]:
        if kernel == "gpu":
            return []
        if self.grid.name == "fp8":
            return [f"the CPU's engine has no kernel for experts in {self.name}; W8A8 runs there with AMX"]
        odd = [size for size in (hidden, middle) if size % CPU_EXPERTS_MULTIPLE]
        return (
            [f"the CPU's int8 experts need channels of {CPU_EXPERTS_MULTIPLE}s, not {odd[0]}"] if odd else []
        )

    def misfit(self, inputs: int) -> str | None:
        return None

    def outputs_misfit(self, outputs: Sequence[int], *, split: bool) -> str | None:
        return None

    def _errors(self, weight: Tensor, scale: Tensor, cost: Tensor) -> Tensor:
        """What rounding to the nearest costs each row, (…, out)."""
        off = self.grid.nearest_(weight / scale).mul_(scale).sub_(weight)
        return (off.square_() @ cost.unsqueeze(-1)).squeeze(-1)

    def _params(self, scale: Tensor, weight: Tensor) -> Params:
        return {"scale": scale.expand(*weight.shape[:-1], 1).contiguous()}


def _scale(absmax: Tensor, grid: Grid) -> Tensor:
    return torch.where(absmax == 0, 1.0, absmax / grid.highest)


def _preset(name: str, grid: Grid, *, by_channel: bool, static: bool) -> Preset:
    scheme = EightBits(name, grid, by_channel, InputQuantizer(grid, static))

    def make(group_size: GroupSize) -> EightBits:
        return scheme

    return Preset(name, make, "channel", fixed_size=True)


PRESETS = (
    _preset("W8A8", INT8, by_channel=True, static=False),
    _preset("FP8_DYNAMIC", FP8, by_channel=True, static=False),
    _preset("FP8", FP8, by_channel=False, static=True),
)
