"""Activation-aware weight quantization, searched in covariance space.

AWQ (Lin et al. 2023, arXiv 2306.00978) protects the weights that meet large activations: it multiplies input
column j of a weight by s_j, rounds, and divides by s_j again; the division is folded into the operation before.
Here s = x^α / w^β, with x the root of the curvature's diagonal (of H: the root mean square activation) and w the
mean relative |weight| of the column (β = 0 is the paper's scale, β = 1 − α its later variant); α and β are found
by trying.

The usual implementations run the block once per candidate. Here a candidate's error is read off the input
covariance H = E[x xᵀ], without a forward pass: `d H_gg dᵀ`, summed over the groups g of a sample of rows, each
with its grid already clipped, so that the scale is chosen for the grid it will really get. Before GPTQ, the variance
that its later columns cannot make up for takes the place of H (`gptq.remaining_variance`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_quantize.clip import best_of, candidates, diagonal_blocks, split_groups
from lowbit_quantize.grid import GridSpec
from lowbit_quantize.parallel import parallel_map

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
BETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
START = (0.2, 0.5)
SEARCH_CLIP = 0.86
SAMPLE_ROWS = 256
SWEEPS = 2
MAX_SCALE = 1e3


@dataclass(frozen=True)
class ScaleChoice:
    """The chosen exponents and scale, (in,)."""

    alpha: float
    beta: float
    scale: Tensor


def search_scale(weight: Tensor, curvature: Tensor, activation: Tensor, spec: GridSpec) -> ScaleChoice:
    """The AWQ scale of linears that share an input.

    `weight` is (out, in), the linears stacked; `curvature` (in, in), or a diagonal (in,); `activation` (in,) the
    root of its diagonal. α and β are swept in turn; α = β = 0, which is scale 1, is always among the candidates.
    """
    sample = weight[torch.linspace(0, len(weight) - 1, min(len(weight), SAMPLE_ROWS)).long()]
    columns = column_weight(weight, spec)
    blocks = diagonal_blocks(curvature, spec.width(weight.shape[1]))
    errors: dict[tuple[float, float], float] = {}

    def error_of(point: tuple[float, float]) -> float:
        return _error(sample, blocks, awq_scale(activation, columns, *point), spec)

    def best_of_all(points: list[tuple[float, float]]) -> tuple[float, float]:
        new = [point for point in points if point not in errors]
        errors.update(zip(new, parallel_map(error_of, new, weight.device), strict=True))
        return min(errors, key=lambda point: errors[point])

    best = best_of_all([(0.0, 0.0), START])
    for _ in range(SWEEPS):
        best = best_of_all([(alpha, best[1]) for alpha in ALPHAS])
        best = best_of_all([(best[0], beta) for beta in BETAS])
    return ScaleChoice(*best, awq_scale(activation, columns, *best))


def awq_scale(activation: Tensor, columns: Tensor, alpha: float, beta: float) -> Tensor:
    """`x^α / w^β`, centred so that its largest and smallest value are reciprocal."""
    scale = activation.clamp(min=1e-6).pow(alpha) / columns.clamp(min=1e-6).pow(beta)
    centred: Tensor = scale / (scale.max() * scale.min()).sqrt()
    return centred.clamp(1 / MAX_SCALE, MAX_SCALE)


def column_weight(weight: Tensor, spec: GridSpec) -> Tensor:
    """Mean over rows of |w| relative to its group's largest: (in,)."""
    groups = spec.split(weight).abs()  # (out, groups, width)
    relative: Tensor = groups / groups.amax(-1, keepdim=True).clamp(min=1e-12)
    return relative.mean(0).flatten()


def _error(weight: Tensor, blocks: Tensor, scale: Tensor, spec: GridSpec) -> float:
    groups = split_groups(weight * scale, spec)
    parts = scale.view(blocks.shape[:2])
    divisor = parts.square() if blocks.dim() == 2 else parts.unsqueeze(2) * parts.unsqueeze(1)
    scaled_blocks = blocks / divisor  # (groups, width, width), or (groups, width)
    grids = candidates(groups, spec, (1.0, SEARCH_CLIP))
    return float(torch.sum(best_of(groups, scaled_blocks, grids).error))
