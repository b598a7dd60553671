"""How engines round what a linear reads: by token, group or block, by a scale found then and there or calibrated.

The arithmetic is vLLM's (0.32: `scaled_int8_quant`, `QuantFP8`, `per_token_group_quant_fp8`, `ref_nvfp4_quant`,
`mxfp4_quantize`, `_mxfp8_e4m3_quantize_torch`): by token, scale = absmax / highest in float32, codes = x times the
scale's reciprocal, of groups x divided by the scale, to the nearest even. tests/contract holds all of it against the
installed engine. FlashInfer's kernels round the power of two of an MXFP4 block up, where vLLM's own and AMD's go to the
even one.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_quantize.schemes.kv_cache import choose_scale
from lowbit_quantize.schemes.numbers.grids import Grid
from lowbit_quantize.schemes.numbers.scale_grids import power_of_two_for

SMALLEST_FP8_SCALE = 1 / (448.0 * 512.0)  # vLLM's
SMALLEST_INPUT = 2.0**-20  # the largest input of a linear that has read nothing but zeros is taken to be this
FP8_MAX = 448.0
SMALLEST_GROUP_ABSMAX = 1e-10  # of its kernel for groups


@dataclass(frozen=True)
class InputQuantizer:
    """Inputs on a grid; `static` ones have one scale that is stored, others one for each token."""

    grid: Grid
    static: bool = False

    @property
    def words(self) -> str:
        """What the manifest says of it."""
        return f"{self.grid.name} by {'one calibrated scale' if self.static else 'token'}"

    @property
    def stored_as(self) -> str:
        """The last part of the name of a static one's scale."""
        return "input_scale"

    def calibrated(self, absmax: Tensor, rows: Tensor) -> float | None:
        """A static one's scale, for inputs of these largest magnitudes, (features,), of which `rows` are some."""
        return choose_scale(absmax, rows)[0] if self.static else None

    def encode(self, inputs: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """Numbers that bfloat16 holds, as float32, of inputs (tokens, features) and their scales, (tokens, 1).

        `scale` is a static one's. Here the numbers are the codes.
        """
        wide = inputs.float()
        if self.static:
            assert scale is not None, "a static quantizer has a scale"
            scales = torch.full((len(wide), 1), scale, device=wide.device)
        else:
            scales = wide.abs().amax(-1, keepdim=True) / self.grid.highest
            if self.grid.name == "fp8":
                scales.clamp_(min=SMALLEST_FP8_SCALE)
        reciprocal = torch.where(scales == 0, 0.0, scales.reciprocal())
        codes = wide.mul_(reciprocal) if wide is not inputs else wide * reciprocal
        return self.grid.nearest_(codes), scales

    def round(self, inputs: Tensor, scale: float | None = None) -> Tensor:
        """What engines compute with, float32, in place of inputs (tokens, features)."""
        codes, scales = self.encode(inputs, scale)
        codes.unflatten(-1, (scales.shape[1], -1)).mul_(scales.unsqueeze(-1))
        return codes


@dataclass(frozen=True)
class GroupInputs(InputQuantizer):
    """Inputs in groups of `width` channels of a token, whose sums of products are scaled one by one."""

    width: int = 0

    @property
    def words(self) -> str:
        return f"{self.grid.name} in groups of {self.width}"

    def encode(self, inputs: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """As of any quantizer; here there is a scale for each group, (tokens, groups)."""
        groups = inputs.float().unflatten(-1, (-1, self.width))  # (tokens, groups, width)
        scales = groups.abs().amax(-1).clamp_(min=SMALLEST_GROUP_ABSMAX) / self.grid.highest
        return self.grid.nearest_(groups / scales.unsqueeze(-1)).flatten(1), scales


@dataclass(frozen=True)
class BlockInputs(InputQuantizer):
    """Inputs in blocks of `width` channels of a token, each under a scale that is found then and there.

    Scales are powers of two, or FP8, multiplied by one calibrated global scale before they are rounded (`static`).
    """

    width: int = 0

    @property
    def words(self) -> str:
        scales = "fp8 under one calibrated scale" if self.static else "powers of two"
        return f"{self.grid.name} in blocks of {self.width}, scales {scales}"

    @property
    def stored_as(self) -> str:
        return "input_global_scale"

    def calibrated(self, absmax: Tensor, rows: Tensor) -> float | None:
        """The global scale: the power of two that leaves the largest block's scale an octave of room.

        Engines take the smallest global scale of what they fuse, and some of all experts of a layer; scales by powers
        of two round alike, whichever is taken. The octave is for inputs larger than any that were seen.
        """
        if not self.static:
            return None
        largest = max(float(absmax.max()) if len(absmax) else 0.0, SMALLEST_INPUT)
        return 2.0 ** math.floor(math.log2(FP8_MAX * self.grid.highest / (2 * largest)))

    def encode(self, inputs: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """As of any quantizer; here the numbers are codes times their blocks' scales."""
        wide = inputs.float().unflatten(-1, (-1, self.width))  # (tokens, blocks, width)
        absmax = wide.abs().amax(-1, keepdim=True)
        if self.static:
            assert scale is not None, "a static quantizer has a scale"
            scales = (scale * (absmax * (1 / self.grid.highest))).clamp_(max=FP8_MAX)
            scales = scales.to(torch.float8_e4m3fn).float()
            factors = scales * (1 / scale)
        else:
            scale = 1.0
            scales = factors = power_of_two_for(absmax, self.grid)
        codes = self.grid.nearest_(wide * torch.where(factors == 0, 0.0, factors.reciprocal()))
        numbers = codes.mul_(scales).flatten(-2)
        return numbers, torch.full((len(numbers), 1), 1 / scale, device=numbers.device)
