"""The eight-bit numbers that weights and inputs are rounded to: int8, evenly spaced, and FP8 (e4m3)."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """One kind of number; `highest` is the largest, and the lowest is its negative."""

    name: Literal["int8", "fp8"]

    @cached_property
    def dtype(self) -> torch.dtype:
        """How files hold it."""
        return torch.int8 if self.name == "int8" else torch.float8_e4m3fn

    @property
    def highest(self) -> float:
        return 127.0 if self.name == "int8" else 448.0

    def nearest_(self, values: Tensor) -> Tensor:
        """The nearest numbers of the grid, in place, of float32 values."""
        values.clamp_(-self.highest, self.highest)
        return values.round_() if self.name == "int8" else values.copy_(values.to(self.dtype))


INT8, FP8 = Grid("int8"), Grid("fp8")
