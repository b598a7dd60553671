"""GPTQ: round one input column at a time and let the columns to come make up for the error.

Frantar et al. 2022, arXiv 2210.17323. With H the covariance of the inputs and U the upper Cholesky factor of its
inverse, column j is rounded, and its error, divided by U_jj, times row j of U is taken from the columns after it:
the best they can do for what is already fixed. Columns go in order of falling H_jj ("activation order"), so the
inputs that matter most are rounded while most columns are left to help; groups stay where they are in memory
("static groups"): a column uses the grid of the group it belongs to, chosen before the first column is rounded.

The whole error comes to `Σ_j e_j² / U_jj²`, with e_j the rounding error of column j, as it is when its turn comes.
So 1 / U_jj², the variance of input j that the inputs after it cannot make up for, is what grids are chosen by (and
AWQ's scales, where they come first), not H, which is what an error costs that nothing makes up for.

Rows do not meet, so blocks of rows are worked on in parallel; within one, a weight lies transposed, so that a
column is contiguous, and updates beyond the current block of columns are applied once for the block.
"""

import torch
from torch import Tensor

from lowbit_core.errors import NumericsError
from lowbit_quantize.clip import search_grids, solve_scales
from lowbit_quantize.grid import GridSpec, Rounded
from lowbit_quantize.parallel import parallel_map

DAMPING = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the mean of diag H; the next is taken when a factor fails
BLOCK_COLUMNS = 32
INVERTED_AT_ONCE = 128
BLOCK_ROWS = 1024


def round_gptq(weight: Tensor, covariance: Tensor, spec: GridSpec) -> Rounded:
    """Round a weight (out, in) by GPTQ on inputs of this covariance (in, in); raises NumericsError.

    Once the codes are chosen, the scales of each row are solved for.
    """
    order, factor = _ordered_factor(covariance)
    scale, zero = search_grids(weight, _remaining_variance(order, factor), spec)
    groups = order // spec.width(weight.shape[1])

    def rows(block: slice) -> Tensor:
        grids = scale[block].T[groups], zero[block].T[groups]  # (in, rows)
        return gptq_codes(weight[block].T[order], *grids, factor, spec)

    blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, weight.shape[0], BLOCK_ROWS)]
    ordered = torch.cat(parallel_map(rows, blocks, weight.device), dim=1)  # (in, out)
    codes = torch.empty_like(ordered)
    codes[order] = ordered
    return solve_scales(Rounded(codes.T.contiguous(), scale, zero, spec), weight, covariance)


def remaining_variance(covariance: Tensor) -> Tensor:
    """What an error in each column costs once the columns after it have made up for it: 1 / U_jj², (in,)."""
    return _remaining_variance(*_ordered_factor(covariance))


def _remaining_variance(order: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(factor[0]).index_copy_(0, order, factor.diagonal().pow(-2))


def _ordered_factor(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The order in which columns are rounded, (in,), and the factor of their inverse covariance in this order."""
    order = covariance.diagonal().argsort(descending=True, stable=True)
    return order, inverse_factor(covariance, order)


def inverse_factor(covariance: Tensor, order: Tensor | None = None) -> Tensor:
    """The upper triangular U with UᵀU = (H + λI)⁻¹, λ raised until H can be factored; raises NumericsError.

    With `order`, (in,), H is taken in that order of its inputs. If LLᵀ is the inputs' covariance in reverse order,
    U is L⁻¹ with its rows and columns reversed.
    """
    backwards = torch.arange(len(covariance), device=covariance.device) if order is None else order
    backwards = backwards.flip(0)
    for damping in DAMPING:  # one name for all steps: few of these large matrices are held
        factor = covariance[backwards][:, backwards]
        factor.diagonal().add_(damping * factor.diagonal().mean().clamp(min=1e-12))
        factor, failed = torch.linalg.cholesky_ex(factor)
        if failed:
            continue
        invert_lower_(factor)
        factor = factor.flip(0, 1)
        ends = torch.stack(torch.aminmax(factor.mT))  # as it lies in memory: aminmax copies anything else
        if torch.isfinite(ends).all():
            found: Tensor = factor
            return found
    raise NumericsError(f"an input covariance cannot be factored even with damping {DAMPING[-1]}")


def invert_lower_(lower: Tensor) -> None:
    """Replace a lower triangular matrix by its inverse, by halves: most of the work is products."""
    size = len(lower)
    if size <= INVERTED_AT_ONCE:
        one = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, one, upper=False))
        return
    half = size // 2
    first, last, between = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    invert_lower_(first)
    invert_lower_(last)
    between.copy_(last @ (between @ first)).neg_()


def gptq_codes(columns: Tensor, scale: Tensor, zero: Tensor, factor: Tensor, spec: GridSpec) -> Tensor:
    """Codes int8 of `columns`, a weight as (in, rows) in rounding order, on grids of the same shape."""
    columns, codes = columns.clone(), torch.empty(columns.shape, dtype=torch.int8, device=columns.device)
    for start in range(0, len(columns), BLOCK_COLUMNS):
        block = slice(start, min(start + BLOCK_COLUMNS, len(columns)))
        found, errors = _block_codes(columns[block], scale[block], zero[block], factor[block, block], spec)
        codes[block] = found
        columns[block.stop :].addmm_(factor[block, block.stop :].T, errors, alpha=-1)
    return codes


def _block_codes(
    columns: Tensor, scale: Tensor, zero: Tensor, factor: Tensor, spec: GridSpec
) -> tuple[Tensor, Tensor]:
    """Codes and errors, float, of some columns, (columns, rows), which are worked on in place.

    A column is a few hundred numbers: what it costs is the number of calls, so each of these counts.
    """
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    views = zip(*(part.unbind() for part in (columns, codes, errors, scale, zero, factor)), strict=True)
    deviations = factor.diagonal().tolist()
    for i, (column, code, error, s, z, row) in enumerate(views):
        torch.div(column, s, out=code).round_()
        if spec.symmetric:
            code.clamp_(spec.lowest, spec.highest)
            torch.addcmul(column, code, s, value=-1, out=error)
        else:
            code.add_(z).clamp_(spec.lowest, spec.highest)
            torch.addcmul(column, code - z, s, value=-1, out=error)
        error.div_(deviations[i])
        columns[i + 1 :].addr_(row[i + 1 :], error, alpha=-1)
    return codes, errors
