"""The integer grid of a weight: groups of inputs, or all inputs, share a scale and, if asymmetric, a zero point.

`w ≈ scale · (code − zero)`. Codes are signed, in [−2^(b−1), 2^(b−1) − 1]; symmetric grids have zero = 0. A
symmetric scale may be negative: the grid has one more level below zero than above, and a group whose largest
weight is positive rounds better on the mirrored grid. Scales are held at the precision they are stored in, so
that what is measured is what is served: compressed-tensors stores bfloat16 and the older formats float16.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class GridSpec:
    """Bits, group size (None: the whole row is one group) and symmetry of a weight's grid."""

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
        """(out, in) to (out, groups, width)."""
        groups: Tensor = weight.unflatten(1, (-1, self.width(weight.shape[1])))
        return groups


@dataclass(frozen=True)
class Rounded:
    """A weight on its grid: codes int8 (out, in), scale and zero (out, groups)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    spec: GridSpec

    def dequantize(self) -> Tensor:
        """The weight that is served, (out, in), float32."""
        groups = self.spec.split(self.codes).float()  # (out, groups, width)
        served: Tensor = (groups - self.zero.unsqueeze(-1)) * self.scale.unsqueeze(-1)
        return served.flatten(1)


def stored(scale: Tensor) -> Tensor:
    """A scale as it will be read back, never zero: exact in bfloat16 and in float16, whatever the format."""
    scale = scale.to(SCALE_DTYPE).to(torch.float16).float()  # bfloat16's 8 bits fit; only the range shrinks
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def range_grid(weight: Tensor, spec: GridSpec, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scale and zero, (out, groups), that cover `clip` of each group's range."""
    return group_grid(spec.split(weight), spec, clip)


def group_grid(groups: Tensor, spec: GridSpec, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """The same for weights that are already split into groups along the last axis, in any order before it."""
    if spec.symmetric:
        reach = groups.abs().amax(-1) * clip
        return stored(2 * reach / (spec.highest - spec.lowest)), torch.zeros_like(reach)
    low = groups.amin(-1).clamp(max=0) * clip
    high = groups.amax(-1).clamp(min=0) * clip
    scale = stored((high - low) / (spec.highest - spec.lowest))
    return scale, (spec.lowest - torch.round(low / scale)).clamp(spec.lowest, spec.highest)


def encode(groups: Tensor, scale: Tensor, zero: Tensor, spec: GridSpec) -> Tensor:
    """Nearest codes, as float, of weights split into groups along the last axis."""
    codes = (groups / scale.unsqueeze(-1)).round_()
    if not spec.symmetric:
        codes.add_(zero.unsqueeze(-1))
    return codes.clamp_(spec.lowest, spec.highest)


def round_to_grid(weight: Tensor, scale: Tensor, zero: Tensor, spec: GridSpec) -> Rounded:
    """Round every weight to its nearest code."""
    codes = encode(spec.split(weight), scale, zero, spec)
    return Rounded(codes.flatten(1).to(torch.int8), scale, zero, spec)


def output_error(difference: Tensor, covariance: Tensor) -> Tensor:
    """`tr(D H Dᵀ)`: the mean squared output error of a weight that is off by D (out, in) on inputs of covariance H."""
    return ((difference @ covariance) * difference).sum()
