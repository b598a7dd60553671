"""4-bit integers in groups whose inputs are rounded to 8 bits by token: W4A8 (int8) and W4AFP8 (FP8).

They are stored as W4A16 is. Where W4A8 is served, vLLM 0.32 takes its kernels for 16-bit inputs first, and loses less
than was measured.

W4AFP8's kernel (vLLM 0.32 on Hopper, `convert_bf16_scales_to_fp8`) does not keep the bfloat16 scales: it divides each
row's by one number and rounds them to FP8. So only such scales are stored as that leaves as they are, up to bfloat16's
last digit; what is measured is what is served. (Where a row's groups are split over ranks, each divides by its own.)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit_quantize.device.memory import without_compiler
from lowbit_quantize.schemes.inputs import SMALLEST_FP8_SCALE, InputQuantizer
from lowbit_quantize.schemes.integer import Integer
from lowbit_quantize.schemes.numbers.affine import stored
from lowbit_quantize.schemes.numbers.grids import FP8, INT8
from lowbit_quantize.schemes.processors.experts import EXPERTS
from lowbit_quantize.schemes.scheme import ExpertSupport, GroupSize, Kernel, Params, Preset

with without_compiler():  # the library compiles a function for 4-bit floats, which is not called here
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

BITS = 4
SHRINK = 8.0  # the kernel keeps an eighth of each FP8 scale
SMALLEST_KEPT = 2.0**-9  # FP8's
HOPPER_MULTIPLE, HOPPER_EXPERTS_MULTIPLE = 128, 256  # `CutlassW4A8LinearKernel`, and of its experts


@dataclass(frozen=True)
class RoundedIntegers(Integer):
    """`w = scale · code`, inputs rounded to int8 by token (W4A8)."""

    def quantization_args(self) -> Mapping[str, Any]:
        inputs: QuantizationArgs = PRESET_SCHEMES[self.name]["input_activations"]
        return {**super().quantization_args(), "input_activations": inputs}

    @property
    def experts(self) -> ExpertSupport:
        return ExpertSupport("nothing", misfit="engines run no packed experts with int8 inputs")

    def expert_obstacles(self, kernel: Kernel, hidden: int, middle: int) -> list[str]:
        return []


@dataclass(frozen=True)
class HopperIntegers(RoundedIntegers):
    """`w = scale · code`, inputs rounded to FP8 by token; scales are what FP8 keeps of them (W4AFP8)."""

    def search(self, weight: Tensor, hessian: Tensor | None) -> Params:
        found = super().search(weight, hessian)
        return {**found, "scale": kept_scales(found["scale"])}

    def refine(self, codes: Tensor, params: Params, weight: Tensor, hessian: Tensor) -> Params:
        """As of integers, and then what the kernel keeps of them, in the rows that err less so."""
        solved = super().refine(codes, params, weight, hessian)
        refined = {**solved, "scale": kept_scales(solved["scale"])}
        errors = []
        for tried in (refined, params):
            off = self.dequantize(codes, tried) - weight
            errors.append((off @ hessian).mul_(off).sum(-1, keepdim=True))
        better = errors[0] < errors[1]
        return {**params, "scale": torch.where(better, refined["scale"], params["scale"])}

    def multiple(self, kernel: Kernel) -> int:
        return HOPPER_MULTIPLE if kernel == "gpu" else super().multiple(kernel)

    def obstacles(self, kernel: Kernel) -> list[str]:
        return [f"vLLM has no CPU kernel for {self.name}"] if kernel == "cpu" else []

    @property
    def experts(self) -> ExpertSupport:
        return ExpertSupport(EXPERTS[self.name].words)

    def expert_obstacles(self, kernel: Kernel, hidden: int, middle: int) -> list[str]:
        odd = [size for size in (hidden, middle) if size % HOPPER_EXPERTS_MULTIPLE]
        if kernel == "cpu" or not odd:
            return []
        return [f"Hopper's experts need channels of {HOPPER_EXPERTS_MULTIPLE}s on a rank, not {odd[0]}"]


def kept_scales(scale: Tensor) -> Tensor:
    """The scales (…, out, groups) that are left as they are by the kernel's own rounding, nearest to some."""
    row = (scale.abs().amax(-1, keepdim=True) / FP8.highest).clamp(min=SMALLEST_FP8_SCALE)
    part = FP8.nearest_(scale / row) / SHRINK
    kept = part.sign() * part.abs().clamp(min=SMALLEST_KEPT).to(FP8.dtype).float() * SHRINK
    return stored(kept * row)


def _preset(name: str, kind: type[RoundedIntegers], inputs: InputQuantizer, *, fixed_size: bool) -> Preset:
    size: int = PRESET_SCHEMES[name]["weights"].group_size

    def make(group_size: GroupSize) -> RoundedIntegers:
        groups = None if group_size == "channel" else group_size
        return kind(BITS, groups, symmetric=True, name=name, input_quantizer=inputs)

    return Preset(name, make, size, fixed_size)


PRESETS = (
    _preset("W4A8", RoundedIntegers, InputQuantizer(INT8), fixed_size=False),
    _preset("W4AFP8", HopperIntegers, InputQuantizer(FP8), fixed_size=True),
)
