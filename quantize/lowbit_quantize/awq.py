"""Activation-aware weight quantization, searched in covariance space.

AWQ (Lin et al. 2023, arXiv 2306.00978) protects the weights that meet large activations: it multiplies input
column j of a weight by s_j, rounds, and divides by s_j again; the division is folded into the operation before.
The scale is s = x^α / w^(1−α), with x the mean |activation| and w the mean |weight| of the column, and α is
found by trying. Then each group's grid is clipped to where the rounded weight errs least.

The usual implementations run the block once per candidate. Here the error of a candidate Ŵ is
`tr((W−Ŵ) H (W−Ŵ)ᵀ)`, with H the mean of x xᵀ: the same number without a forward pass. The clip search uses
the blocks of H on the diagonal, one for each group, so every group of every row is searched at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_quantize.grid import GridSpec, encode, output_error, range_grid, round_to_grid, stored

COARSE_ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
FINE_STEPS = (0.1, 0.05)
CLIPS = (1.0, 0.93, 0.86, 0.79, 0.72, 0.65)
REFINEMENTS = 2
ROW_BLOCK = 256  # rows whose candidates are held at once


@dataclass(frozen=True)
class ScaleChoice:
    """The chosen exponent, its scale (in,), and the output error relative to that of scale 1."""

    alpha: float
    scale: Tensor
    gain: float


def search_scale(weight: Tensor, covariance: Tensor, mean_abs: Tensor, spec: GridSpec) -> ScaleChoice:
    """The AWQ scale of linears that share an input.

    `weight` is (out, in), the linears stacked; `covariance` (in, in); `mean_abs` (in,). α goes over a coarse
    grid and is then refined around the best; α = 0 with scale 1 is always a candidate.
    """
    columns = _column_weight(weight, spec)
    errors: dict[float | None, float] = {None: _rounding_error(weight, covariance, torch.ones_like(mean_abs), spec)}

    def attempt(alpha: float) -> None:
        if 0.0 <= alpha <= 1.0 and alpha not in errors:
            errors[alpha] = _rounding_error(weight, covariance, awq_scale(mean_abs, columns, alpha), spec)

    for alpha in COARSE_ALPHAS:
        attempt(alpha)
    for step in FINE_STEPS:
        best = min((a for a in errors if a is not None), key=lambda a: errors[a])
        attempt(round(best - step, 3))
        attempt(round(best + step, 3))
    chosen = min(errors, key=lambda a: errors[a])
    gain = errors[chosen] / max(errors[None], 1e-30)
    if chosen is None:
        return ScaleChoice(0.0, torch.ones_like(mean_abs), 1.0)
    return ScaleChoice(chosen, awq_scale(mean_abs, columns, chosen), gain)


def awq_scale(mean_abs: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """`x^α / w^(1−α)`, centred so that its largest and smallest value are reciprocal."""
    scale = mean_abs.clamp(min=1e-6).pow(alpha) / columns.clamp(min=1e-6).pow(1 - alpha)
    scale = scale / (scale.max() * scale.min()).sqrt()
    return scale.clamp(1e-3, 1e3)


def _column_weight(weight: Tensor, spec: GridSpec) -> Tensor:
    """Mean over rows of |w| relative to its group's largest: (in,)."""
    groups = weight.unflatten(1, (-1, spec.group_size)).abs()  # (out, groups, group_size)
    return (groups / groups.amax(-1, keepdim=True).clamp(min=1e-12)).mean(0).flatten()


def _rounding_error(weight: Tensor, covariance: Tensor, scale: Tensor, spec: GridSpec) -> float:
    scaled = weight * scale
    rounded = round_to_grid(scaled, *range_grid(scaled, spec), spec).dequantize() / scale
    return float(output_error(weight - rounded, covariance))


def search_grid(weight: Tensor, covariance: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero, (out, groups), of the grid that errs least on each group's own inputs."""
    blocks = diagonal_blocks(covariance, spec.group_size)
    parts = [_search_rows(rows, blocks, spec) for rows in weight.split(ROW_BLOCK)]
    return torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts])


def diagonal_blocks(covariance: Tensor, group_size: int) -> Tensor:
    """The (groups, group_size, group_size) blocks of H that lie on the diagonal."""
    count = covariance.shape[0] // group_size
    return torch.stack([covariance.unflatten(0, (count, -1)).unflatten(2, (count, -1))[g, :, g] for g in range(count)])


def _search_rows(weight: Tensor, blocks: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor]:
    groups = weight.unflatten(1, (-1, spec.group_size))  # (rows, groups, group_size)
    best = torch.full(groups.shape[:2], torch.inf, device=weight.device)
    scale, zero = range_grid(weight, spec)

    def keep_better(candidate: Tensor, offset: Tensor) -> None:
        nonlocal best, scale, zero
        codes = encode(groups, candidate, offset, spec)
        error = block_error(groups - (codes - offset.unsqueeze(-1)) * candidate.unsqueeze(-1), blocks)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, candidate, scale), torch.where(better, offset, zero)

    for clip in CLIPS:
        for candidate, offset in _candidates(weight, spec, clip):
            keep_better(candidate, offset)
    for _ in range(REFINEMENTS):
        keep_better(least_squares_scale(groups, scale, zero, blocks, spec), zero)
    return scale, zero


def _candidates(weight: Tensor, spec: GridSpec, clip: float) -> Sequence[tuple[Tensor, Tensor]]:
    scale, zero = range_grid(weight, spec, clip)
    return ((scale, zero), (-scale, zero)) if spec.symmetric else ((scale, zero),)


def least_squares_scale(groups: Tensor, scale: Tensor, zero: Tensor, blocks: Tensor, spec: GridSpec) -> Tensor:
    """The scale that errs least for the codes that `scale` gives: `qᵀHw / qᵀHq` in each group."""
    steps = encode(groups, scale, zero, spec) - zero.unsqueeze(-1)
    weighted = torch.einsum("rgi,gij->rgj", steps, blocks)
    refined = (weighted * groups).sum(-1) / (weighted * steps).sum(-1).clamp(min=1e-20)
    return stored(torch.where(refined == 0, scale, refined))


def block_error(difference: Tensor, blocks: Tensor) -> Tensor:
    """`d_g H_gg d_gᵀ` of each group: (rows, groups, group_size) to (rows, groups)."""
    return (torch.einsum("rgi,gij->rgj", difference, blocks) * difference).sum(-1)
