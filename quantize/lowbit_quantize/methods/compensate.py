"""Compensation alone: weights keep their type and move, so that the model comes nearer to the base again.

For what passes have taken out: each linear becomes what makes up for the error so far of its inputs and of the residual
stream, as far as two halves of the calibration text agree (statistics/error_compensation.py). With a scheme that
quantizes, codes are then the nearest.
"""

from torch import Tensor

from lowbit_quantize.methods.method import InputScale, Need, Site, refined_nearest
from lowbit_quantize.schemes.scheme import Quantized, Scheme


class Compensate:
    """What it is given to quantize is the weight that is aimed at already."""

    name = "compensate"
    needs: frozenset[Need] = frozenset({"hessian", "base_stream"})
    scales_inputs = False

    def input_scale(self, site: Site) -> InputScale | None:
        return None

    def cost(self, hessian: Tensor) -> Tensor:
        return hessian

    def quantize(
        self, weight: Tensor, hessian: Tensor, scheme: Scheme, mask: Tensor | None = None
    ) -> Quantized:
        return refined_nearest(weight, hessian, scheme)
