"""Scales of blocks that are themselves small numbers (`scale_grids.py`), chosen by output error.

A block's plain scale makes its largest weight the largest number. Around it each neighbour on the grid of scales is
tried: a block whose largest weight becomes 4 rather than 6 has finer steps at its top. A block's error is
`d H_gg dᵀ`, with d its quantization error and H_gg the Hessian of its own inputs, or a diagonal before GPTQ, as for
integers (`affine_search.py`).

Once all codes are fixed, a row's error is quadratic in its scales, and scales on a grid are found one after the other:
each goes to the number that is nearest to its own minimum while the others stay. No step raises the row's error.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_quantize.device import ranks
from lowbit_quantize.device.blocks import search_weights, solve_rows
from lowbit_quantize.schemes.numbers.grids import Grid
from lowbit_quantize.schemes.numbers.scale_grids import ScaleGrid
from lowbit_quantize.schemes.scheme import cost_blocks
from lowbit_quantize.schemes.search.affine_search import block_error, relative_error, scale_system

SWEEPS = 3
SYSTEM_NUMBERS = 1 << 25  # of the systems that are held at once


@dataclass(frozen=True)
class Blocks:
    """Numbers of one grid in blocks of `width` inputs, each under a scale of another.

    `w ≈ code · scale / divisor`; the divisor is a number for each weight, (…, 1, 1), or one.
    """

    numbers: Grid
    scales: ScaleGrid
    width: int

    def split(self, weight: Tensor) -> Tensor:
        """(…, out, in) to (…, out, groups, width)."""
        groups: Tensor = weight.unflatten(-1, (-1, self.width))
        return groups

    def plain(self, weight: Tensor, divisor: Tensor) -> Tensor:
        """The bytes of the scales that make each block's largest weight the largest number, (…, out, groups)."""
        widest = self.split(weight).abs().amax(-1)
        return self.scales.bytes_of(widest * divisor / self.numbers.highest)

    def encode(self, weight: Tensor, scale: Tensor, divisor: Tensor) -> Tensor:
        """The nearest numbers, float32, of a weight (…, out, in)."""
        steps = self.split(weight) / (scale / divisor).unsqueeze(-1)
        return self.numbers.nearest_(steps).flatten(-2)

    def search(self, weight: Tensor, cost: Tensor, divisor: Tensor) -> Tensor:
        """The scales, (…, out, groups), that err least in each block of a weight (…, out, in) by itself.

        `cost` is (…, in, in), or a diagonal in its place, (…, in).
        """
        blocks = cost_blocks(cost, weight, self.width)
        rows = max(1, search_weights(weight.device) // weight[..., 0, :].numel())
        parts = ranks.spread(
            lambda part: self.best(part, blocks, divisor)[0], weight.split(rows, dim=-2), weight.device
        )
        return torch.cat(parts, dim=-2)

    def best(
        self, weight: Tensor, blocks: Tensor, divisor: Tensor, steps: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """`search` of some rows, and their errors, both (…, rows, groups); `steps` are the neighbours that are tried.

        `blocks` are of the Hessian's diagonal, (…, groups, width, width), or of a diagonal, (…, groups, width).
        """
        groups = self.split(weight).transpose(-3, -2).contiguous()  # (…, groups, rows, width)
        first = self.plain(weight, divisor).mT
        best: tuple[Tensor, Tensor] | None = None
        for step in self.scales.around if steps is None else steps:
            tried = self.scales.values_of(first + step)
            served = (tried / divisor).unsqueeze(-1)
            off = self.numbers.nearest_(groups / served).mul_(served).sub_(groups)
            found = block_error(off, blocks)
            if best is None:
                best = tried, found
                continue
            better = found < best[1]
            best = torch.where(better, tried, best[0]), torch.where(better, found, best[1])
        assert best is not None, "no neighbour to try"
        return best[0].mT, best[1].mT

    def refine(
        self, codes: Tensor, scale: Tensor, divisor: Tensor, weight: Tensor, hessian: Tensor
    ) -> Tensor:
        """Scales that err less, or as little, for codes that are fixed, (…, out, groups)."""
        count = scale.shape[-1]
        rows = max(1, min(solve_rows(weight.device), SYSTEM_NUMBERS // count**2))
        parts = list(zip(*(one.split(rows, dim=-2) for one in (codes, scale, weight)), strict=True))
        refined = ranks.spread(lambda part: self._refine_rows(part, divisor, hessian), parts, weight.device)
        return torch.cat(refined, dim=-2)

    def _refine_rows(self, rows: tuple[Tensor, ...], divisor: Tensor, hessian: Tensor) -> Tensor:
        codes, scale, weight = rows
        quadratic, slope = scale_system(self.split(codes.float()), weight, hessian)
        served, found = scale / divisor, scale.clone()
        before = relative_error(served, quadratic, slope)
        curvature = quadratic.diagonal(dim1=-2, dim2=-1)
        for _ in range(SWEEPS):
            for g in range(scale.shape[-1]):
                own = curvature[..., g]
                pull = slope[..., g] - (quadratic[..., g, :] * served).sum(-1)
                wanted = served[..., g] + pull / own.clamp(min=1e-30)
                nearest = self.scales.nearest(wanted.unsqueeze(-1) * divisor)
                fits = ((own > 0) & (wanted > 0)).unsqueeze(-1)
                taken = torch.where(fits, nearest, found[..., g : g + 1])
                found[..., g : g + 1] = taken
                served[..., g : g + 1] = taken / divisor
        better = relative_error(served, quadratic, slope) < before
        return torch.where(better.unsqueeze(-1), found, scale)
