"""Round to nearest: parameters from the weight's range, and nothing else. The control that every method has to beat."""

from torch import Tensor

from lowbit_quantize.methods.method import InputScale, Need, Site
from lowbit_quantize.schemes.scheme import Quantized, Scheme


class RoundToNearest:
    """Each weight goes to its nearest code."""

    name = "rtn"
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
        return Quantized(scheme.quantize(weight, params), params, scheme)
