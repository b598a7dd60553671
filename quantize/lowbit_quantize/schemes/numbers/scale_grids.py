"""What scales of blocks are stored in: FP8 (e4m3), and powers of two (E8M0, the microscaling formats').

A scale is counted by its byte: the bytes of positive numbers lie in the order of the numbers, so that a neighbour is
the next byte. Zero, infinity and NaN are left out: no block has such a scale, whatever its weights are.
Source: OCP Microscaling Formats (MX) 1.0 (2023); NVIDIA's NVFP4 as in compressed-tensors.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowbit_quantize.schemes.numbers.grids import Grid

BIAS = 127  # of a power of two
LOWEST_FP8, HIGHEST_FP8 = 2.0**-9, 448.0


@dataclass(frozen=True)
class ScaleGrid:
    """One kind of scale; `around` are the neighbours of a block's plain scale that a search tries."""

    name: Literal["fp8", "power of two"]

    @property
    def dtype(self) -> torch.dtype:
        """How files hold it."""
        return torch.float8_e4m3fn if self.name == "fp8" else torch.uint8

    @property
    def highest(self) -> float:
        return HIGHEST_FP8 if self.name == "fp8" else 2.0**BIAS

    @property
    def ends(self) -> tuple[int, int]:
        """The lowest byte and the highest."""
        return (1, 0x7E) if self.name == "fp8" else (1, 2 * BIAS)

    @property
    def around(self) -> tuple[int, ...]:
        """Of the scale under which a block's largest weight is the largest number: from 0.7 to 1.5 times as large,
        so that the largest weight may be clipped by a quarter, or be the last number but one.
        """
        return tuple(range(-4, 6)) if self.name == "fp8" else (-1, 0, 1)

    def bytes_of(self, values: Tensor) -> Tensor:
        """The byte, int32, of the scale that is nearest to each of some numbers, float32."""
        if self.name == "fp8":
            stored = values.clamp(LOWEST_FP8, HIGHEST_FP8).to(self.dtype)
            return stored.view(torch.uint8).to(torch.int32)
        mantissa, exponent = torch.frexp(values)  # from a half to one
        nearest = exponent + (BIAS - 1) + (mantissa > 0.75).to(torch.int32)
        return torch.where(values > 0, nearest, 0).clamp_(*self.ends)

    def values_of(self, stored: Tensor) -> Tensor:
        """The scales, float32, that some bytes stand for; what lies beyond the ends is the end."""
        inside = stored.clamp(*self.ends)
        if self.name == "fp8":
            return inside.to(torch.uint8).view(self.dtype).float()
        return torch.ldexp(torch.ones_like(inside, dtype=torch.float32), inside - BIAS)

    def nearest(self, values: Tensor) -> Tensor:
        """The nearest scales."""
        return self.values_of(self.bytes_of(values))

    def stored(self, scale: Tensor) -> Tensor:
        """Scales of the grid as the file holds them."""
        return scale.to(self.dtype) if self.name == "fp8" else self.bytes_of(scale).to(self.dtype)

    def read(self, stored: Tensor) -> Tensor:
        """The inverse of `stored`."""
        return stored.float() if self.name == "fp8" else self.values_of(stored.to(torch.int32))


def power_of_two_for(absmax: Tensor, numbers: Grid) -> Tensor:
    """The power of two under which a block's largest number, of these magnitudes, has the grid's top exponent.

    A magnitude counts as the next power of two from 7/8 of it on, if it is not the grid's largest number itself
    ("even": vLLM, compressed-tensors and AMD's Quark).
    """
    mantissa, exponent = torch.frexp(absmax)  # from a half to one
    up = (mantissa >= 0.875) & (mantissa != numbers.highest / 2 ** (numbers.top_exponent + 1))
    exponent = exponent - 1 + up.to(torch.int32) - numbers.top_exponent
    one = torch.ones_like(absmax)
    return torch.ldexp(one, torch.where(absmax == 0, -BIAS + 1, exponent).clamp(-BIAS + 1, BIAS))


FP8_SCALES, POWERS_OF_TWO = ScaleGrid("fp8"), ScaleGrid("power of two")
