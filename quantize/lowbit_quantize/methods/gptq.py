"""GPTQ: quantize one input column at a time and let the columns to come make up for the error.

Frantar et al. 2022, arXiv 2210.17323. With H the Hessian of the inputs and U the upper Cholesky factor of its
inverse, column j is quantized, and its error, divided by U_jj, times row j of U is taken from the columns after it:
the best they can do for what is already fixed. Columns go in order of falling H_jj ("activation order"), so the
inputs that matter most are quantized while most columns are left to help; groups stay where they are in memory
("static groups"): a column has the parameters of the group it belongs to, chosen before the first column is quantized.

The whole error comes to `Σ_j e_j² / U_jj²`, with e_j the error of column j, as it is when its turn comes.
So 1 / U_jj², the variance of input j that the inputs after it cannot make up for, is what parameters are chosen by (and
AWQ's scales, where they come first), not H, which is what an error costs that nothing makes up for.

Rows do not meet, so blocks of rows are worked on in parallel; within one, a weight lies transposed, so that a
column is contiguous, and updates beyond the current block of columns are applied once for the block.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowbit_core.errors import NumericsError
from lowbit_quantize.device.blocks import column_rows
from lowbit_quantize.device.parallel import parallel_map
from lowbit_quantize.methods.method import InputScale, Need, Site
from lowbit_quantize.schemes.scheme import QuantizeColumn, Quantized, Scheme

DAMPING = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the mean of diag H; the next is taken when a factor fails
BLOCK_COLUMNS = 32
INVERTED_AT_ONCE = 128


class Gptq:
    """Codes that make up for each other; once they are chosen, the parameters of each row are refined."""

    name = "gptq"
    needs: frozenset[Need] = frozenset({"hessian", "base_stream"})
    scales_inputs = False

    def input_scale(self, site: Site) -> InputScale | None:
        return None

    def cost(self, hessian: Tensor) -> Tensor:
        """What an error in each column costs once the columns after it have made up for it: 1 / U_jj², (in,)."""
        return _remaining_variance(*_ordered_factor(hessian))

    def quantize(self, weight: Tensor, hessian: Tensor, scheme: Scheme) -> Quantized:
        order, factor = _ordered_factor(hessian)
        params = scheme.search(weight, _remaining_variance(order, factor))
        groups = order // scheme.width(weight.shape[1])

        def rows(block: slice) -> Tensor:
            columns = scheme.columns({name: values[block] for name, values in params.items()}, groups)
            return gptq_codes(weight[block].T[order], columns, factor, scheme.code_dtype)

        step = column_rows(weight.device)
        blocks = [slice(start, start + step) for start in range(0, weight.shape[0], step)]
        ordered = torch.cat(parallel_map(rows, blocks, weight.device), dim=1)  # (in, out)
        codes = torch.empty_like(ordered)
        codes[order] = ordered
        codes = codes.T.contiguous()
        return Quantized(codes, scheme.refine(codes, params, weight, hessian), scheme)


def _remaining_variance(order: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(factor[0]).index_copy_(0, order, factor.diagonal().pow(-2))


def _ordered_factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The order in which columns are quantized, (in,), and the factor of their inverse Hessian in this order."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    return order, inverse_factor(hessian, order)


def inverse_factor(hessian: Tensor, order: Tensor | None = None) -> Tensor:
    """The upper triangular U with UᵀU = (H + λI)⁻¹, λ raised until H can be factored; raises NumericsError.

    With `order`, (in,), H is taken in that order of its inputs. If LLᵀ is the inputs' Hessian in reverse order,
    U is L⁻¹ with its rows and columns reversed.
    """
    backwards = torch.arange(len(hessian), device=hessian.device) if order is None else order
    backwards = backwards.flip(0)
    for damping in DAMPING:  # one name for all steps: few of these large matrices are held
        factor = hessian[backwards][:, backwards]
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
    raise NumericsError(f"an input Hessian cannot be factored even with damping {DAMPING[-1]}")


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


def gptq_codes(
    columns: Tensor,
    quantizers: Callable[[slice], Sequence[QuantizeColumn]],
    factor: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Codes of `columns`, a weight as (in, rows) in the order of quantization; `quantizers` as of `Scheme.columns`."""
    columns, codes = columns.clone(), torch.empty(columns.shape, dtype=dtype, device=columns.device)
    for start in range(0, len(columns), BLOCK_COLUMNS):
        block = slice(start, min(start + BLOCK_COLUMNS, len(columns)))
        found, errors = _block_codes(columns[block], quantizers(block), factor[block, block])
        codes[block] = found
        columns[block.stop :].addmm_(factor[block, block.stop :].T, errors, alpha=-1)
    return codes


def _block_codes(
    columns: Tensor, quantizers: Sequence[QuantizeColumn], factor: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes and errors, float, of some columns, (columns, rows), which are worked on in place.

    A column is a few hundred numbers: what it costs is the number of calls, so each of these counts.
    """
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    views = zip(columns.unbind(), codes.unbind(), errors.unbind(), quantizers, factor.unbind(), strict=True)
    deviations = factor.diagonal().tolist()
    for i, (column, code, error, quantize, row) in enumerate(views):
        quantize(column, code, error)
        error.div_(deviations[i])
        columns[i + 1 :].addr_(row[i + 1 :], error, alpha=-1)
    return codes, errors
