"""The small numbers that weights and inputs are rounded to: int8, evenly spaced, FP8 (e4m3) and FP4 (e2m1)."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

EXPONENT = 0x7F800000  # of the bits of a float32
HALF_STEPS = 1.5 * 2.0**22  # times a power of two: float32's last digit there is half of that power


@dataclass(frozen=True)
class Grid:
    """One kind of number; `highest` is the largest, and the lowest is its negative."""

    name: Literal["int8", "fp8", "fp4"]

    @cached_property
    def dtype(self) -> torch.dtype:
        """How files hold it; two FP4 numbers share a byte."""
        return {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp4": torch.uint8}[self.name]

    @property
    def highest(self) -> float:
        return {"int8": 127.0, "fp8": 448.0, "fp4": 6.0}[self.name]

    @property
    def top_exponent(self) -> int:
        """The exponent of two of the largest number, which decides the scales of a microscaled format."""
        return {"int8": 6, "fp8": 8, "fp4": 2}[self.name]

    def nearest_(self, values: Tensor) -> Tensor:
        """The nearest numbers of the grid, in place, of float32 values; ties go to the even one."""
        if self.name == "fp4":
            return _nearest_fp4_(values)
        values.clamp_(-self.highest, self.highest)
        return values.round_() if self.name == "int8" else values.copy_(values.to(self.dtype))


def _nearest_fp4_(values: Tensor) -> Tensor:
    """0, 0.5, 1, 1.5, 2, 3, 4 and 6, of either sign.

    Numbers from 2^e on lie 2^e / 2 apart, those below 1 as those above it. What is added to a value, and taken away
    again, is so large that float32 keeps it in such steps.
    """
    large = values.view(torch.int32).bitwise_and(EXPONENT).view(torch.float32)
    large.clamp_(1.0, 4.0).mul_(HALF_STEPS)
    return values.add_(large).sub_(large).clamp_(-6.0, 6.0)


INT8, FP8, FP4 = Grid("int8"), Grid("fp8"), Grid("fp4")
