"""Affine integers: groups of inputs, or all inputs, share a scale and, if asymmetric, a zero point.

`w ≈ scale · (code − zero)`. Codes are signed, in [−2^(b−1), 2^(b−1) − 1]; symmetric ones have zero = 0. A symmetric
scale may be negative: there is one more level below zero than above, and a group whose largest weight is positive is
quantized better with the signs turned. Scales are held at the precision they are stored in: compressed-tensors stores
bfloat16 and the older formats float16.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Affine:
    """Bits, group size (None: the whole row is one group) and symmetry."""

    bits: int
    group_size: int | None
    symmetric: bool

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def width(self, features: int) -> int:
        """Inputs in a group of a weight with so many inputs."""
        return self.group_size or features

    def split(self, weight: Tensor) -> Tensor:
        """(…, out, in) to (…, out, groups, width)."""
        groups: Tensor = weight.unflatten(-1, (-1, self.width(weight.shape[-1])))
        return groups


def stored(scale: Tensor) -> Tensor:
    """A scale as it will be read back, never zero: exact in bfloat16 and in float16, whatever the format."""
    scale = scale.to(SCALE_DTYPE).to(torch.float16).float()  # bfloat16's 8 bits fit; only the range shrinks
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def range_params(groups: Tensor, affine: Affine, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scale and zero that cover `clip` of each group's range; groups lie along the last axis."""
    if affine.symmetric:
        absmax = groups.abs().amax(-1) * clip
        return stored(2 * absmax / (affine.highest - affine.lowest)), torch.zeros_like(absmax)
    low = groups.amin(-1).clamp(max=0) * clip
    high = groups.amax(-1).clamp(min=0) * clip
    scale = stored((high - low) / (affine.highest - affine.lowest))
    return scale, (affine.lowest - torch.round(low / scale)).clamp(affine.lowest, affine.highest)


def encode(groups: Tensor, scale: Tensor, zero: Tensor, affine: Affine) -> Tensor:
    """Nearest codes, as float, of weights split into groups along the last axis."""
    codes = (groups / scale.unsqueeze(-1)).round_()
    if not affine.symmetric:
        codes.add_(zero.unsqueeze(-1))
    return codes.clamp_(affine.lowest, affine.highest)
