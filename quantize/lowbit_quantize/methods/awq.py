"""Activation-aware weight quantization, searched by means of the Hessian.

AWQ (Lin et al. 2023, arXiv 2306.00978) protects the weights that meet large activations: it multiplies input column j
of a weight by s_j, quantizes, and divides by s_j again; the division is folded into the operation before. Here s =
x^α / w^β, with x the root of the diagonal of what errors cost (of H: the root mean square activation) and w the mean
relative |weight| of the column (β = 0 is the paper's scale, β = 1 − α its later variant); α and β are found by
trying.

The usual implementations run the block once per candidate. Here a candidate's error is read off the Hessian
H = E[x xᵀ], without a forward pass: `d H_gg dᵀ`, summed over the groups g of a sample of rows, each
with its parameters already clipped, so that the scale is chosen for those it will really get. Before GPTQ, the variance
that its later columns cannot make up for takes the place of H (`Gptq.cost`).

What is rounded to nearest is not the layer's own weight but the one that makes up for the error of the layers before
(statistics/error_compensation.py), as in GPTQ: the papers' AWQ does not do that, and loses 1.7 times as much.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_quantize.device import ranks
from lowbit_quantize.methods.method import InputScale, Need, Site, SitePart, refined_nearest
from lowbit_quantize.schemes.scheme import Quantized, Scheme, diagonal_blocks

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
BETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
START = (0.2, 0.5)
SAMPLE_ROWS = 256
SWEEPS = 2
MAX_SCALE = 1e3


class Awq:
    """Scales of the inputs, and parameters that err least; codes are the nearest."""

    name = "awq"
    needs: frozenset[Need] = frozenset({"hessian", "base_stream"})
    scales_inputs = True

    def input_scale(self, site: Site) -> InputScale | None:
        activation = site.tie(root_mean_square(site.parts[0].cost))
        return search_scale(site.parts, activation)

    def cost(self, hessian: Tensor) -> Tensor:
        return hessian

    def quantize(
        self, weight: Tensor, hessian: Tensor, scheme: Scheme, mask: Tensor | None = None
    ) -> Quantized:
        return refined_nearest(weight, hessian, scheme)


def search_scale(parts: Sequence[SitePart], activation: Tensor) -> InputScale:
    """The AWQ scale of linears that share an input; `activation` (in,) is the root mean square of each channel.

    α and β are swept in turn; α = β = 0, which is scale 1, is always among the candidates.
    """
    samples = [_sample(part) for part in parts]
    columns = torch.stack([column_weight(part.weight, part.scheme) for part in parts]).mean(0)
    errors: dict[tuple[float, float], float] = {}

    def error_of(point: tuple[float, float]) -> float:
        scale = awq_scale(activation, columns, *point)
        return sum(_error(rows, blocks, scale, scheme) for rows, blocks, scheme in samples)

    def best_of_all(points: list[tuple[float, float]]) -> tuple[float, float]:
        new = [point for point in points if point not in errors]
        errors.update(zip(new, ranks.spread(error_of, new, activation.device), strict=True))
        return min(errors, key=lambda point: errors[point])

    best = best_of_all([(0.0, 0.0), START])
    for _ in range(SWEEPS):
        best = best_of_all([(alpha, best[1]) for alpha in ALPHAS])
        best = best_of_all([(best[0], beta) for beta in BETAS])
    return InputScale(awq_scale(activation, columns, *best), best[0])


def awq_scale(activation: Tensor, columns: Tensor, alpha: float, beta: float) -> Tensor:
    """`x^α / w^β`, centred so that its largest and smallest value are reciprocal."""
    scale = activation.clamp(min=1e-6).pow(alpha) / columns.clamp(min=1e-6).pow(beta)
    centred: Tensor = scale / (scale.max() * scale.min()).sqrt()
    return centred.clamp(1 / MAX_SCALE, MAX_SCALE)


def column_weight(weight: Tensor, scheme: Scheme) -> Tensor:
    """Mean over rows of |w| relative to its group's largest: (in,)."""
    groups: Tensor = weight.unflatten(1, (-1, scheme.width(weight.shape[1]))).abs()  # (out, groups, width)
    relative: Tensor = groups / groups.amax(-1, keepdim=True).clamp(min=1e-12)
    return relative.mean(0).flatten()


def root_mean_square(cost: Tensor) -> Tensor:
    """Root of the diagonal of what errors cost, (in,)."""
    diagonal = cost if cost.dim() == 1 else cost.diagonal()
    return diagonal.clamp(min=0).sqrt()


def _sample(part: SitePart) -> tuple[Tensor, Tensor, Scheme]:
    """Some rows of a weight, spread evenly, the blocks of what their errors cost, and their scheme."""
    count = len(part.weight)
    rows = part.weight[torch.linspace(0, count - 1, min(count, SAMPLE_ROWS)).long()]
    return rows, diagonal_blocks(part.cost, part.scheme.width(rows.shape[1])), part.scheme


def _error(rows: Tensor, blocks: Tensor, scale: Tensor, scheme: Scheme) -> float:
    parts = scale.view(blocks.shape[:2])
    divisor = parts.square() if blocks.dim() == 2 else parts.unsqueeze(2) * parts.unsqueeze(1)
    return scheme.trial_error(rows * scale, blocks / divisor)
