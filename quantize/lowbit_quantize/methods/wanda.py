"""Wanda: weights that matter little for the inputs that they meet become zero, the others stay. A control.

Sun et al. 2023, arXiv 2306.11695: a weight's score is |w_ij| ‖x_j‖, compared within its row or every few inputs. The
root of the Hessian's diagonal is ‖x_j‖ up to a factor that all inputs share.
"""

from torch import Tensor

from lowbit_quantize.methods.method import Need
from lowbit_quantize.methods.pruner import Pruned, Pruner


class Wanda(Pruner):
    """The mask of the largest |w| ‖x‖; nothing makes up for what is gone."""

    name = "wanda"
    needs: frozenset[Need] = frozenset({"hessian"})

    def stack(self, weight: Tensor, hessian: Tensor) -> Pruned:
        norms = hessian.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().unsqueeze(1)  # (n, 1, in)
        mask = self.sparsity.mask(weight.abs() * norms)
        return Pruned(weight * mask, mask)
