"""Methods that set weights to zero: each yields a mask, which the method after it keeps.

In a recipe's list such a method stands behind those that scale inputs, so that the mask is chosen for weights as they
will be multiplied, and before the one that quantizes. Where it stands last itself, codes are the nearest.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import field_validator
from torch import Tensor

from lowbit_core.documents import Section
from lowbit_quantize.device import ranks
from lowbit_quantize.device.blocks import column_rows
from lowbit_quantize.methods.method import InputScale, Need, Site, refined_nearest
from lowbit_quantize.methods.sparsity import NofM, Sparsity, sparsity_of
from lowbit_quantize.schemes.scheme import Quantized, Scheme


class PrunerOptions(Section):
    """`sparsity`: 2:4, 4:8, or a ratio of zeros."""

    sparsity: Any = NofM(2, 4)

    @field_validator("sparsity", mode="plain")
    @classmethod
    def _known(cls, given: Any) -> Any:
        return sparsity_of(given)


@dataclass(frozen=True)
class Pruned:
    """Weights (…, out, in) that are zero off `mask`, (…, out, in) of booleans."""

    weight: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Pruner:
    """What all of them share; one overrides `stack`, which is given weights (n, out, in), Hessians (n, in, in)."""

    sparsity: Sparsity = field(default=NofM(2, 4))

    name = ""
    needs: frozenset[Need] = frozenset()
    scales_inputs = False
    options = PrunerOptions
    products = 0  # of a weight with its Hessian, at most

    def with_options(self, options: PrunerOptions) -> "Pruner":
        """The same method by a recipe's options."""
        return type(self)(options.sparsity)

    def input_scale(self, site: Site) -> InputScale | None:
        return None

    def cost(self, hessian: Tensor) -> Tensor:
        return hessian

    def prune(self, weight: Tensor, hessian: Tensor) -> Pruned:
        """A weight (out, in) on inputs of this Hessian, or several of one shape at once; raises NumericsError."""
        if weight.dim() == 2:
            one = self.stack(weight.unsqueeze(0), hessian.unsqueeze(0))
            return Pruned(one.weight[0], one.mask[0])
        return self.stack(weight, hessian)

    def stack(self, weight: Tensor, hessian: Tensor) -> Pruned:
        raise NotImplementedError

    def quantize(
        self, weight: Tensor, hessian: Tensor, scheme: Scheme, mask: Tensor | None = None
    ) -> Quantized:
        return refined_nearest(self.prune(weight, hessian).weight, hessian, scheme)


def by_rows(weight: Tensor, work: Callable[[Tensor], Pruned]) -> Pruned:
    """What `work` makes of weights (n, out, in), some rows at a time, dealt among ranks."""
    parts = ranks.spread(
        lambda rows: _pair(work(rows)), weight.split(column_rows(weight.device), dim=1), weight.device
    )
    weights, masks = (torch.cat(one, dim=1) for one in zip(*parts, strict=True))
    return Pruned(weights, masks)


def _pair(found: Pruned) -> tuple[Tensor, Tensor]:
    return found.weight, found.mask
