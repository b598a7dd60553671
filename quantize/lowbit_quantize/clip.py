"""The grid of every group of a weight, chosen by output error rather than by range.

Each group tries its range clipped by a few factors, on the grid and on its mirror image, and then the scale
that is best in the least-squares sense for the codes so found. A group's error is `d H_gg dᵀ`, with d its
rounding error and H_gg the covariance of its own inputs: what AWQ's clip search measures by running the block.
Where columns make up for each other later (GPTQ) a diagonal stands in for H: what an error in each still costs.

At last, with the codes fixed, all scales of a row are solved for together (`solve_scales`): the error of a row
is quadratic in its scales, and the minimum takes the correlation between groups into account.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit_quantize.grid import GridSpec, Rounded, encode, group_grid, round_to_grid, stored
from lowbit_quantize.parallel import parallel_map

CLIPS = (1.0, 0.93, 0.86, 0.79, 0.72, 0.65)
REFINEMENTS = 2
BLOCK_WEIGHTS = 1 << 17  # weights whose candidates are held at once: few enough for a core's cache
SOLVE_ROWS = 512  # rows that are solved at once
RIDGE = 1e-4  # pull of `solve_scales` towards the scales it starts from, relative to the mean curvature
Candidate = tuple[
    Tensor, Tensor, Tensor
]  # scale and zero, (groups, rows), and codes less zero of each weight


@dataclass(frozen=True)
class Best:
    """The best grid so far of each group: error, scale and zero, each (groups, rows)."""

    error: Tensor
    scale: Tensor
    zero: Tensor


def round_clipped(weight: Tensor, covariance: Tensor, spec: GridSpec) -> Rounded:
    """Round a weight (out, in) on the grids that err least on inputs of this covariance (in, in)."""
    scale, zero = search_grids(weight, covariance, spec)
    return solve_scales(round_to_grid(weight, scale, zero, spec), weight, covariance)


def search_grids(weight: Tensor, curvature: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero, (out, groups), of the grids that err least in each group by itself.

    `curvature` is the covariance of the inputs, (in, in), or a diagonal in its place, (in,).
    """
    blocks = diagonal_blocks(curvature, spec.width(weight.shape[1]))
    row_blocks = weight.split(max(1, BLOCK_WEIGHTS // weight.shape[1]))
    parts = parallel_map(lambda rows: _search_rows(rows, blocks, spec), row_blocks, weight.device)
    scale, zero = (torch.cat(part, dim=1).T.contiguous() for part in zip(*parts, strict=True))
    return scale, zero


def diagonal_blocks(curvature: Tensor, width: int) -> Tensor:
    """The (groups, width, width) blocks on the diagonal of a matrix; of a diagonal, its parts, (groups, width)."""
    count = curvature.shape[0] // width
    if curvature.dim() == 1:
        return curvature.view(count, width)
    tiles = curvature.view(count, width, count, width)
    return torch.stack([tiles[group, :, group] for group in range(count)])


def split_groups(weight: Tensor, spec: GridSpec) -> Tensor:
    """(rows, in) to (groups, rows, width): the order in which groups meet their covariance without a copy."""
    return spec.split(weight).transpose(0, 1).contiguous()


def candidates(groups: Tensor, spec: GridSpec, clips: Iterable[float]) -> Iterator[Candidate]:
    """Grids that cover a part of each group's range, for each of `clips`; symmetric ones also mirrored.

    The nearest numbers on a grid and on its mirror image differ in sign, before they are clamped.
    """
    for clip in clips:
        scale, zero = group_grid(groups, spec, clip)
        if not spec.symmetric:
            yield scale, zero, _steps(groups, scale, zero, spec)
            continue
        nearest = (groups / scale.unsqueeze(-1)).round_()
        yield scale, zero, nearest.clamp(spec.lowest, spec.highest)
        yield -scale, zero, nearest.neg_().clamp_(spec.lowest, spec.highest)


def best_of(
    groups: Tensor,
    blocks: Tensor,
    grids: Iterable[Candidate],
    best: Best | None = None,
) -> Best:
    """For each group of (groups, rows, width), the grid that errs least, among these and `best`."""
    for scale, zero, steps in grids:
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
    assert best is not None, "no grids to choose from"
    return best


def block_error(difference: Tensor, blocks: Tensor) -> Tensor:
    """`d_g H_gg d_gᵀ` of each group: (groups, rows, width) to (groups, rows)."""
    return _times(difference, blocks).mul_(difference).sum(-1)


def _times(rows: Tensor, blocks: Tensor) -> Tensor:
    """(groups, rows, width) times each group's block, or its diagonal."""
    return torch.bmm(rows, blocks) if blocks.dim() == 3 else rows * blocks.unsqueeze(1)


def _steps(groups: Tensor, scale: Tensor, zero: Tensor, spec: GridSpec) -> Tensor:
    """Codes less their zero point: what the scale multiplies."""
    codes = encode(groups, scale, zero, spec)
    return codes if spec.symmetric else codes.sub_(zero.unsqueeze(-1))


def _search_rows(weight: Tensor, blocks: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor]:
    groups = split_groups(weight, spec)
    best = best_of(groups, blocks, candidates(groups, spec, CLIPS))
    for _ in range(REFINEMENTS):
        refined = least_squares_scale(groups, best, blocks, spec)
        best = best_of(groups, blocks, [(refined, best.zero, _steps(groups, refined, best.zero, spec))], best)
    return best.scale, best.zero


def least_squares_scale(groups: Tensor, grid: Best, blocks: Tensor, spec: GridSpec) -> Tensor:
    """The scale that errs least for the codes that a grid gives: `qᵀHw / qᵀHq` in each group."""
    steps = _steps(groups, grid.scale, grid.zero, spec)
    weighted = _times(steps, blocks)
    refined = (weighted * groups).sum(-1) / (weighted * steps).sum(-1).clamp(min=1e-20)
    return stored(torch.where(refined == 0, grid.scale, refined))


def solve_scales(rounded: Rounded, weight: Tensor, covariance: Tensor) -> Rounded:
    """With the codes fixed, the scales of each row that minimize `(w−ŵ) H (w−ŵ)ᵀ` over all groups together.

    ŵ = Σ_g s_g q_g is linear in the scales, so they solve A s = b with A_gh = q_g H q_hᵀ and b_g = q_g H wᵀ. A
    small ridge holds them near where they were; a row that would err more keeps its scales.
    """
    parts = [
        _solve_rows(codes, scale, zero, rows, covariance, rounded.spec)
        for codes, scale, zero, rows in zip(
            *(part.split(SOLVE_ROWS) for part in (rounded.codes, rounded.scale, rounded.zero, weight)),
            strict=True,
        )
    ]
    return replace(rounded, scale=torch.cat(parts))


def _solve_rows(
    codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor, covariance: Tensor, spec: GridSpec
) -> Tensor:
    steps = spec.split(codes).float() - zero.unsqueeze(-1)  # (rows, groups, width)
    tiles = covariance.view(steps.shape[1], steps.shape[2], covariance.shape[1])
    curvature = torch.zeros(len(steps), *[steps.shape[1]] * 2, device=steps.device)  # (rows, groups, groups)
    for g, tile in enumerate(tiles):  # the matrix is symmetric
        rest = steps[:, g:]
        reach = (steps[:, g] @ tile[:, g * steps.shape[2] :]).view_as(rest)
        curvature[:, g, g:] = curvature[:, g:, g] = reach.mul_(rest).sum(-1)
    slope = ((weight @ covariance).view_as(steps) * steps).sum(-1)  # (rows, groups)
    pull = RIDGE * curvature.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-20
    system = curvature + torch.diag_embed(pull.expand_as(scale))
    solved = stored(torch.linalg.solve(system, slope + pull * scale))

    def relative_error(s: Tensor) -> Tensor:  # up to the constant w H wᵀ
        error: Tensor = torch.einsum("rg,rgh,rh->r", s, curvature, s) - 2 * (s * slope).sum(-1)
        return error

    better = (relative_error(solved) < relative_error(scale)) & torch.isfinite(solved).all(-1)
    return torch.where(better.unsqueeze(-1), solved, scale)
