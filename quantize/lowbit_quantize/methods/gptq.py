"""GPTQ: quantize one input column at a time and let the columns to come make up for the error.

Frantar et al. 2022, arXiv 2210.17323. A row that is off by d costs d H dᵀ, with H the Hessian of the inputs. With
H = L Lᵀ that is |d L|², whose component k needs only the columns from k on: so columns are quantized from the last to
the first, and what the others have left in component k is taken from column k before its turn: c_k = w_k + Σ_{j>k} d_j
L_jk / L_kk. That is Babai's nearest plane, and the codes are those of GPTQ's own loop, which works on a factor of H's
inverse (Chen et al. 2025, arXiv 2507.18553); the inverse costs twice as much as the factor, and is not needed.

Columns lie in order of rising H_jj ("activation order"), so the inputs that matter most are quantized while most
columns are left to help; groups stay where they are in memory ("static groups"): a column has the parameters of the
group it belongs to, chosen before the first column is quantized.

The whole error comes to `Σ_j e_j² L_jj²`, with e_j the error of column j, as it is when its turn comes. So L_jj², the
variance of input j that the inputs after it cannot make up for, is what parameters are chosen by (and AWQ's scales,
where they come first), not H, which is what an error costs that nothing makes up for.

Weights of one shape, experts', are quantized together, by as many calls as one of them. Rows do not meet, so blocks of
rows are worked on in parallel; within one, a weight lies transposed, so that a column is contiguous, and updates beyond
the current block of columns are applied once for the block.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowbit_core.errors import NumericsError
from lowbit_quantize.device import ranks
from lowbit_quantize.device.blocks import column_rows
from lowbit_quantize.device.factors import cholesky_in_place, ordered
from lowbit_quantize.methods.method import InputScale, Need, Site
from lowbit_quantize.schemes.scheme import Params, QuantizeColumn, Quantized, Scheme, take_rows

SHRINKAGE = 0.1  # of H towards its diagonal
DAMPING = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the mean of diag H; the next is taken when a factor fails
BLOCK_COLUMNS = 32


class Gptq:
    """Codes that make up for each other; once they are chosen, the parameters of each row are refined."""

    name = "gptq"
    needs: frozenset[Need] = frozenset({"hessian", "base_stream"})
    scales_inputs = False

    def input_scale(self, site: Site) -> InputScale | None:
        return None

    def cost(self, hessian: Tensor) -> Tensor:
        """What an error in each column costs once the columns after it have made up for it: L_jj², (in,)."""
        return _remaining_variance(*ordered_factor(hessian.unsqueeze(0)))[0]

    def quantize(
        self, weight: Tensor, hessian: Tensor, scheme: Scheme, mask: Tensor | None = None
    ) -> Quantized:
        if weight.dim() == 2:
            alone = None if mask is None else mask.unsqueeze(0)
            (one,) = _quantized(weight.unsqueeze(0), hessian.unsqueeze(0), scheme, alone).split()
            return one
        return _quantized(weight, hessian, scheme, mask)


def _quantized(weight: Tensor, hessian: Tensor, scheme: Scheme, mask: Tensor | None) -> Quantized:
    """Weights of one shape, (n, out, in), on Hessians (n, in, in)."""
    order, factor = ordered_factor(hessian)
    params = scheme.search(weight, _remaining_variance(order, factor))
    groups = order // scheme.width(weight.shape[-1])
    factor.div_(factor.diagonal(dim1=1, dim2=2).unsqueeze(1))
    kept = None if mask is None else take_rows(mask.mT, order)
    ordered = dealt_codes(take_rows(weight.mT, order), params, groups, factor, scheme, kept)
    codes = torch.empty_like(ordered)
    for one, rank, found in zip(codes, order, ordered, strict=True):
        one[rank] = found
    codes = codes.mT.contiguous()
    return Quantized(codes, scheme.refine(codes, params, weight, hessian), scheme)


def dealt_codes(
    turned: Tensor,
    params: Params,
    groups: Tensor,
    shares: Tensor,
    scheme: Scheme,
    mask: Tensor | None = None,
) -> Tensor:
    """`gptq_codes` of weights that lie transposed and ordered, (n, in, out), block of rows by block of rows.

    What `mask`, (n, in, out), does not keep is zero before and after.
    """

    def rows(block: slice) -> Tensor:
        columns = scheme.columns({name: values[:, block] for name, values in params.items()}, groups)
        if mask is not None:
            columns = _masked(columns, mask[:, :, block])
        return gptq_codes(turned[:, :, block], columns, shares, scheme.code_dtype)

    step = column_rows(turned.device)
    blocks = [slice(start, start + step) for start in range(0, turned.shape[2], step)]
    return torch.cat(ranks.spread(rows, blocks, turned.device), dim=2)


def _masked(
    columns: Callable[[slice], Sequence[QuantizeColumn]], mask: Tensor
) -> Callable[[slice], Sequence[QuantizeColumn]]:
    """The same quantizers, which aim at zero wherever the mask, (n, in, rows), does not keep a weight."""

    def one(quantize: QuantizeColumn, kept: Tensor) -> QuantizeColumn:
        return lambda aim, column, code, left: quantize(aim.mul_(kept), column, code, left)

    return lambda block: [
        one(quantize, kept) for quantize, kept in zip(columns(block), mask[:, block].unbind(1), strict=True)
    ]


def _remaining_variance(order: Tensor, factor: Tensor) -> Tensor:
    """L_jj² of each input, (n, in)."""
    variance = factor.diagonal(dim1=1, dim2=2).square()
    return torch.empty_like(variance).scatter_(1, order, variance)


def ordered_factor(hessian: Tensor, together: int = 1) -> tuple[Tensor, Tensor]:
    """How columns lie, (n, in), the first to be quantized last, and the lower L of L Lᵀ = H' + λI in this order.

    So many columns stay `together`, side by side as they were, in the order of their mean.

    Of Hessians (n, in, in). H' is H with a tenth less between inputs (shrunk towards its diagonal, as by Ledoit and
    Wolf 2004): what inputs have in common on one text they have less on another. λ is raised until all of them can be
    factored; raises NumericsError.
    """
    order = _rising(hessian.diagonal(dim1=1, dim2=2), together)
    for damping in DAMPING:
        factor = ordered(hessian, order)
        diagonal = factor.diagonal(dim1=1, dim2=2)
        damped = diagonal + damping * diagonal.mean(1, keepdim=True).clamp(min=1e-12)
        factor.mul_(1 - SHRINKAGE)
        diagonal.copy_(damped)
        factor, failed = cholesky_in_place(factor)
        # Ends as they lie in memory: aminmax copies anything else.
        if not failed.any() and torch.isfinite(torch.stack(torch.aminmax(factor.mT))).all():
            return order, factor
        del factor  # before there is another
    raise NumericsError(f"an input Hessian cannot be factored even with damping {DAMPING[-1]}")


def _rising(variance: Tensor, together: int) -> Tensor:
    """Places of columns by rising variance, (n, in); runs of `together` are not torn apart."""
    if together == 1:
        return variance.argsort(descending=True, stable=True).flip(1)
    runs = variance.unflatten(1, (-1, together)).mean(-1).argsort(descending=True, stable=True).flip(1)
    order: Tensor = runs.unsqueeze(-1) * together + torch.arange(together, device=variance.device)
    return order.flatten(1)


def gptq_codes(
    columns: Tensor,
    quantizers: Callable[[slice], Sequence[QuantizeColumn]],
    shares: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Codes of weights as (n, in, rows), their columns in the order of `ordered_factor`, the last quantized first.

    `shares` are L_jk / L_kk, (n, in, in): of what column j has left, how much column k takes; `quantizers` as of
    `Scheme.columns`.
    """
    wanted, codes = columns.clone(), torch.empty(columns.shape, dtype=dtype, device=columns.device)
    for stop in range(columns.shape[1], 0, -BLOCK_COLUMNS):
        block = slice(max(0, stop - BLOCK_COLUMNS), stop)
        found, left = _block_codes(
            wanted[:, block], columns[:, block], quantizers(block), shares[:, block, block]
        )
        codes[:, block] = found
        wanted[:, : block.start].baddbmm_(shares[:, block, : block.start].mT, left)
    return codes


def _block_codes(
    wanted: Tensor, columns: Tensor, quantizers: Sequence[QuantizeColumn], shares: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes of some columns, float, and what they leave of `columns`, (n, columns, rows); `wanted` is worked on.

    A column is a few hundred numbers: what it costs is the number of calls, so each of these counts.
    """
    codes, left = torch.empty_like(wanted), torch.empty_like(wanted)
    taken = shares.mT.unsqueeze(-1).contiguous()  # (n, taking, leaving, 1)
    views = zip(*(part.unbind(1) for part in (wanted, columns, codes, left)), quantizers, strict=True)
    for i, (aim, column, code, rest, quantize) in reversed(list(enumerate(views))):
        quantize(aim, column, code, rest)
        wanted[:, :i].addcmul_(taken[:, :i, i], rest.unsqueeze(1))
    return codes, left
