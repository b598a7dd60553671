"""Magnitude pruning: the smallest weights become zero, and the others stay as they are. A control."""

from torch import Tensor

from lowbit_quantize.methods.pruner import Pruned, Pruner


class Magnitude(Pruner):
    """The mask of the largest |w|, of each row or of every few inputs."""

    name = "magnitude"

    def stack(self, weight: Tensor, hessian: Tensor) -> Pruned:
        mask = self.sparsity.mask(weight.abs())
        return Pruned(weight * mask, mask)
