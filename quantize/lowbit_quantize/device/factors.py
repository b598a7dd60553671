"""Work on the largest matrices of a run, inputs by inputs, without a second one of their size."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ROWS = 1024  # that are worked on at once


def cholesky_in_place(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The lower L of L Lᵀ = `matrix`, (…, n, n), symmetric, in the memory of it; and which could not be factored, (…).

    LAPACK works on columns, and a symmetric matrix lies in memory by columns as it does by rows.
    """
    lower = matrix.mT
    failed = torch.empty(0, dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    return lower, failed


def ordered(matrices: Tensor, orders: Tensor) -> Tensor:
    """Matrices, (n, in, in), with rows and columns of each in another order, (n, in)."""
    result = torch.empty_like(matrices)
    for place, matrix, order in zip(result, matrices, orders, strict=True):
        for some in _rows(matrix):
            torch.index_select(matrix[order[some]], 1, order, out=place[some])
    return result


def divided(hessian: Tensor, scale: Tensor) -> Tensor:
    """The Hessian, (n, n), of inputs that are divided by `scale`, (n,)."""
    result = torch.empty_like(hessian)
    for some in _rows(hessian):
        torch.div(hessian[some], torch.outer(scale[some], scale), out=result[some])
    return result


def _rows(matrix: Tensor) -> Iterator[slice]:
    return (slice(start, start + BLOCK_ROWS) for start in range(0, len(matrix), BLOCK_ROWS))
