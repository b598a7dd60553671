"""Scales and zero points of affine integers, chosen by output error rather than by range.

Each group tries its range clipped by a few factors, with either sign of the scale, and then the scale that is best in
the least-squares sense for the codes so found. A group's error is `d H_gg dᵀ`, with d its quantization error and H_gg
the Hessian of its own inputs: what AWQ's clip search measures by running the block. Where columns make up for each
other later (GPTQ) a diagonal stands in for H: what an error in each still costs.

At last, with the codes fixed, all scales of a row are solved for together (`solve_scales`): the error of a row
is quadratic in its scales, and the minimum takes the correlation between groups into account.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_quantize.device import ranks
from lowbit_quantize.device.blocks import search_weights, solve_rows
from lowbit_quantize.schemes.numbers.affine import Affine, encode, range_params, stored
from lowbit_quantize.schemes.scheme import cost_blocks

CLIPS = (1.0, 0.93, 0.86, 0.79, 0.72, 0.65)
REFINEMENTS = 2
RIDGE = 1e-4  # pull of `solve_scales` towards the scales it starts from, relative to the mean of its diagonal
Candidate = tuple[
    Tensor, Tensor, Tensor
]  # scale and zero, (groups, rows), and codes less zero of each weight


@dataclass(frozen=True)
class Best:
    """The best parameters so far of each group: error, scale and zero, each (groups, rows)."""

    error: Tensor
    scale: Tensor
    zero: Tensor


def search_params(weight: Tensor, hessian: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
    """Scale and zero, (…, out, groups), that err least in each group of a weight (…, out, in) by itself.

    `hessian` is (…, in, in), or a diagonal in its place, (…, in).
    """
    blocks = cost_blocks(hessian, weight, affine.width(weight.shape[-1]))
    row_blocks = weight.split(max(1, search_weights(weight.device) // weight[..., 0, :].numel()), dim=-2)
    parts = ranks.spread(lambda rows: _search_rows(rows, blocks, affine), row_blocks, weight.device)
    scale, zero = (torch.cat(part, dim=-1).mT.contiguous() for part in zip(*parts, strict=True))
    return scale, zero


def split_groups(weight: Tensor, affine: Affine) -> Tensor:
    """(…, rows, in) to (…, groups, rows, width): the order in which groups meet their Hessian without a copy."""
    return affine.split(weight).transpose(-3, -2).contiguous()


def candidates(groups: Tensor, affine: Affine, clips: Iterable[float]) -> Iterator[Candidate]:
    """Parameters that cover a part of each group's range, for each of `clips`; symmetric ones with either sign.

    The nearest codes under a scale and under its negative differ in sign, before they are clamped.
    """
    for clip in clips:
        scale, zero = range_params(groups, affine, clip)
        if not affine.symmetric:
            yield scale, zero, _steps(groups, scale, zero, affine)
            continue
        nearest = (groups / scale.unsqueeze(-1)).round_()
        yield scale, zero, nearest.clamp(affine.lowest, affine.highest)
        yield -scale, zero, nearest.neg_().clamp_(affine.lowest, affine.highest)


def best_of(
    groups: Tensor,
    blocks: Tensor,
    tried: Iterable[Candidate],
    best: Best | None = None,
) -> Best:
    """For each group of (…, groups, rows, width), what errs least, among these and `best`."""
    for scale, zero, steps in tried:
        error = block_error(steps.mul_(scale.unsqueeze(-1)).sub_(groups), blocks)
        if best is None:
            best = Best(error, scale, zero)
            continue
        better = error < best.error
        best = Best(
            torch.where(better, error, best.error),
            torch.where(better, scale, best.scale),
            torch.where(better, zero, best.zero),
        )
    assert best is not None, "nothing to choose from"
    return best


def block_error(difference: Tensor, blocks: Tensor) -> Tensor:
    """`d_g H_gg d_gᵀ` of each group: (…, groups, rows, width) to (…, groups, rows)."""
    return _times(difference, blocks).mul_(difference).sum(-1)


def _times(rows: Tensor, blocks: Tensor) -> Tensor:
    """(…, groups, rows, width) times each group's block, or its diagonal."""
    return rows @ blocks if blocks.dim() == rows.dim() else rows * blocks.unsqueeze(-2)


def _steps(groups: Tensor, scale: Tensor, zero: Tensor, affine: Affine) -> Tensor:
    """Codes less their zero point: what the scale multiplies."""
    codes = encode(groups, scale, zero, affine)
    return codes if affine.symmetric else codes.sub_(zero.unsqueeze(-1))


def _search_rows(weight: Tensor, blocks: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
    groups = split_groups(weight, affine)
    best = best_of(groups, blocks, candidates(groups, affine, CLIPS))
    for _ in range(REFINEMENTS):
        refined = least_squares_scale(groups, best, blocks, affine)
        best = best_of(
            groups, blocks, [(refined, best.zero, _steps(groups, refined, best.zero, affine))], best
        )
    return best.scale, best.zero


def least_squares_scale(groups: Tensor, found: Best, blocks: Tensor, affine: Affine) -> Tensor:
    """The scale that errs least for the codes that some parameters give: `qᵀHw / qᵀHq` in each group."""
    steps = _steps(groups, found.scale, found.zero, affine)
    weighted = _times(steps, blocks)
    refined = (weighted * groups).sum(-1) / (weighted * steps).sum(-1).clamp(min=1e-20)
    return stored(torch.where(refined == 0, found.scale, refined))


def solve_scales(
    codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor, hessian: Tensor, affine: Affine
) -> Tensor:
    """With the codes fixed, the scales of each row that minimize `(w−ŵ) H (w−ŵ)ᵀ` over all groups together.

    ŵ = Σ_g s_g q_g is linear in the scales, so they solve A s = b with A_gh = q_g H q_hᵀ and b_g = q_g H wᵀ. A
    small ridge holds them near where they were; a row that would err more keeps its scales.
    """
    rows = solve_rows(weight.device)
    blocks = zip(*(part.split(rows, dim=-2) for part in (codes, scale, zero, weight)), strict=True)
    solved = ranks.spread(lambda block: _solve_rows(block, hessian, affine), list(blocks), weight.device)
    return torch.cat(solved, dim=-2)


def _solve_rows(rows: tuple[Tensor, ...], hessian: Tensor, affine: Affine) -> Tensor:
    codes, scale, zero, weight = rows
    steps = affine.split(codes).float() - zero.unsqueeze(-1)  # (…, rows, groups, width)
    quadratic, slope = scale_system(steps, weight, hessian)
    pull = RIDGE * quadratic.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True) + 1e-20
    system = quadratic + torch.diag_embed(pull.expand_as(scale))
    solved = stored(torch.linalg.solve(system, slope + pull * scale))
    better = relative_error(solved, quadratic, slope) < relative_error(scale, quadratic, slope)
    better &= torch.isfinite(solved).all(-1)
    return torch.where(better.unsqueeze(-1), solved, scale)


def scale_system(steps: Tensor, weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """A_gh = q_g H q_hᵀ, (…, rows, groups, groups), and b_g = q_g H wᵀ, (…, rows, groups).

    Of what each scale multiplies, (…, rows, groups, width), and weights (…, rows, in).
    """
    count, width = steps.shape[-2:]
    quadratic = torch.zeros(*steps.shape[:-1], count, device=steps.device)
    for g in range(count):  # the matrix is symmetric
        rest, tile = steps[..., g:, :], hessian[..., g * width : (g + 1) * width, g * width :]
        reach = (steps[..., g, :] @ tile).view_as(rest)
        quadratic[..., g, g:] = quadratic[..., g:, g] = reach.mul_(rest).sum(-1)
    return quadratic, ((weight @ hessian).view_as(steps) * steps).sum(-1)


def relative_error(scale: Tensor, quadratic: Tensor, slope: Tensor) -> Tensor:
    """What each row errs under its scales, (…, rows), up to the constant w H wᵀ."""
    error: Tensor = torch.einsum("...g,...gh,...h->...", scale, quadratic, scale) - 2 * (scale * slope).sum(
        -1
    )
    return error
