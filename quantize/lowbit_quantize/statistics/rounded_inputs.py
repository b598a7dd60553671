"""What rounding its inputs does to a linear: another Hessian, and a weight that makes up for a part of it.

Engines multiply by x̂, not x. The weight T that comes nearest to W x minimizes `E‖T x̂ − W x‖²`, so
T = W + W E[(x − x̂) x̂ᵀ] Ĥ⁻¹ with Ĥ = E[x̂ x̂ᵀ], and what an error of T costs is weighed by Ĥ. Both expectations differ
from those of x by what a sample of tokens says.
"""

import torch
from torch import Tensor

RIDGE = 0.01  # of the mean of diag Ĥ


def with_rounded_inputs(
    weight: Tensor, hessian: Tensor, rows: Tensor, rounded: Tensor
) -> tuple[Tensor, Tensor]:
    """The weight to quantize, (out, in), and the Hessian of its inputs once they are rounded, (in, in).

    `rows` are some inputs, (tokens, in), and `rounded` what engines make of them. Unchanged where the sample is too
    small for its Hessian to stay positive.
    """
    found = hessian + (rounded.T @ rounded - rows.T @ rows) / len(rows)
    ridge = RIDGE * found.diagonal().mean().clamp(min=1e-12)
    factor, failed = torch.linalg.cholesky_ex(found + ridge * torch.eye(len(found), device=found.device))
    if failed:
        return weight, hessian
    off = (rounded.T @ (rows - rounded)) / len(rows)  # E[x̂ (x − x̂)ᵀ]
    return weight + torch.cholesky_solve(off @ weight.T, factor).T, found
