"""What a method is. In a recipe's list of methods all may scale inputs, in turn, and the last one quantizes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from lowbit_quantize.schemes.scheme import Quantized, Scheme

Need = Literal["hessian", "base_stream", "input_range", "gradients"]


@dataclass(frozen=True)
class SitePart:
    """Linears that are quantized alike: their stacked weight (out, in), its scheme, and what an error of it costs.

    `cost` is (in, in), or a diagonal (in,), as the method that quantizes them has it (`Method.cost`).
    """

    weight: Tensor
    scheme: Scheme
    cost: Tensor


@dataclass(frozen=True)
class Site:
    """All linears that read one activation, which the operation before them can divide by a scale.

    `tie` makes the values of channels equal, (in,) to (in,), that must share a scale. `inputs` are some of what they
    read, (tokens, in), where a method needs `input_range` or engines round inputs.
    """

    parts: Sequence[SitePart]
    tie: Callable[[Tensor], Tensor] = lambda channels: channels
    inputs: Tensor | None = None


@dataclass(frozen=True)
class InputScale:
    """What inputs are divided by and columns multiplied by, (in,), and the exponent that it came from."""

    scale: Tensor
    alpha: float


class Method(Protocol):
    """One way to choose numbers; hashable, because linears that are quantized alike are found by it.

    `needs`: what it must be given beside the weight; `base_stream` lets the base model's calibration tokens walk too,
    and weights are then aimed at what makes up for earlier errors (statistics/error_compensation.py).
    `scales_inputs`: whether `input_scale` may give a scale. Only such methods, and those that prune (pruner.py), may
    stand before another.
    """

    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> frozenset[Need]: ...
    @property
    def scales_inputs(self) -> bool: ...

    def input_scale(self, site: Site) -> InputScale | None:
        """What to divide the inputs of a site by; None to leave them."""
        ...

    def cost(self, hessian: Tensor) -> Tensor:
        """What an error costs when this method quantizes, (in, in) or its diagonal (in,)."""
        ...

    def quantize(
        self, weight: Tensor, hessian: Tensor, scheme: Scheme, mask: Tensor | None = None
    ) -> Quantized:
        """Quantize a weight (out, in) on inputs of this Hessian (in, in); raises NumericsError.

        Or several of one shape at once, (n, out, in) and (n, in, in): each becomes what it would by itself. The weight
        is zero off the `mask`, (out, in) of booleans, of a method before this one, and stays so.
        """
        ...


def refined_nearest(weight: Tensor, hessian: Tensor, scheme: Scheme) -> Quantized:
    """The nearest codes under parameters that err least, and then the parameters that err least for these codes."""
    params = scheme.search(weight, hessian)
    codes = scheme.quantize(weight, params)
    return Quantized(codes, scheme.refine(codes, params, weight, hessian), scheme)
