"""A method of one file: noise as large as a group's largest error is added, and then the nearest code is taken.

In the mean over seeds a weight between two codes is then what it was, which no code nearest to it is ("dither").
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_quantize.methods.method import InputScale, Need, Site
from lowbit_quantize.schemes.scheme import Quantized, Scheme


@dataclass(frozen=True)
class RandomRounding:
    """Draws are the same for the same seed and shape."""

    seed: int = 0

    name = "random_rounding"
    needs: frozenset[Need] = frozenset()
    scales_inputs = False

    def input_scale(self, site: Site) -> InputScale | None:
        return None

    def cost(self, hessian: Tensor) -> Tensor:
        return hessian

    def quantize(
        self, weight: Tensor, hessian: Tensor, scheme: Scheme, mask: Tensor | None = None
    ) -> Quantized:
        params = scheme.search(weight, None)
        width = scheme.width(weight.shape[1])
        off = (weight - scheme.dequantize(scheme.quantize(weight, params), params)).abs()
        reach = off.unflatten(1, (-1, width)).amax(-1).repeat_interleave(width, dim=1)
        drawn = torch.rand(weight.shape, generator=torch.Generator().manual_seed(self.seed))
        noisy = weight + (2 * drawn.to(weight.device) - 1) * reach
        return Quantized(scheme.quantize(noisy, params), params, scheme)
