"""SmoothQuant: inputs are divided, and columns multiplied, by what makes both easier to round.

Xiao et al. 2022 (arXiv 2211.10438) take s_j = max|x_j|^α / max|w_j|^(1−α). Here s is searched against the pair of
roundings. Where inputs are rounded by token and weights by channel, and errors are spread evenly over a step, the
output errs by

    E_t[max_j (x_tj / s_j)²] · Σ_j s_j² Σ_o w_oj²  +  Σ_o max_j (s_j w_oj)² · Σ_j H_jj / s_j²,

inputs first, weights second, up to one factor: each a product of sums of exponentials in log s, so that the whole is
convex and has one minimum, found by gradient. The scale found so, the paper's for some α, and 1 are then judged by
real rounding, and the best is taken.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lowbit_quantize.methods.method import InputScale, Need, Site, SitePart, refined_nearest
from lowbit_quantize.schemes.scheme import Quantized, Scheme, diagonal_blocks

ALPHAS = (0.3, 0.45, 0.6, 0.75, 0.9)
START = 0.6  # where the descent begins
MAX_SCALE = 1e4
STEPS, RATE = 30, 0.15  # of the descent, in log s; 120 at 0.05 gain 0.2 %
ROWS, TOKENS = 256, 512  # that it is made on


class SmoothQuant:
    """A scale of the inputs; what quantizes comes after it."""

    name = "smoothquant"
    needs: frozenset[Need] = frozenset({"hessian", "input_range"})
    scales_inputs = True

    def input_scale(self, site: Site) -> InputScale | None:
        if site.inputs is None or not len(site.inputs):
            return None
        candidates = [(0.0, torch.ones_like(site.inputs[0])), *_candidates(site)]
        errors = [_pair_error(site, scale) for _, scale in candidates]
        alpha, scale = candidates[errors.index(min(errors))]
        return InputScale(scale, alpha)

    def cost(self, hessian: Tensor) -> Tensor:
        return hessian

    def quantize(
        self, weight: Tensor, hessian: Tensor, scheme: Scheme, mask: Tensor | None = None
    ) -> Quantized:
        return refined_nearest(weight, hessian, scheme)


def _candidates(site: Site) -> Iterator[tuple[float, Tensor]]:
    """Scales, each with its exponent; 1 stands for the one that descent finds."""
    assert site.inputs is not None
    inputs = site.inputs.abs().amax(0).clamp(min=1e-5)
    weights = torch.stack([part.weight.abs().amax(0) for part in site.parts]).amax(0).clamp(min=1e-5)
    start = None
    for alpha in ALPHAS:
        scale = _centred(site.tie(inputs.pow(alpha) / weights.pow(1 - alpha)).log())
        start = scale if alpha == START else start
        yield alpha, scale
    assert start is not None
    yield 1.0, _descend(site, start.log())


def _centred(logarithm: Tensor) -> Tensor:
    """A scale whose largest and smallest value are reciprocal: what is common to all changes nothing."""
    middle = (logarithm.max() + logarithm.min()) / 2
    return (logarithm - middle).exp().clamp(1 / MAX_SCALE, MAX_SCALE)


@torch.enable_grad()
def _descend(site: Site, start: Tensor) -> Tensor:
    assert site.inputs is not None
    rows = site.inputs[:: max(1, len(site.inputs) // TOKENS)]
    tokens, counts = rows.abs().clamp(min=1e-6).log(), (_token_weights(rows) / len(rows)).log()
    parts = [_Logarithms(part, cost) for part, cost in zip(site.parts, _costs(site), strict=True)]
    logarithm = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([logarithm], lr=RATE)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        tied = site.tie(logarithm.exp()).log()
        step_of_inputs = (2 * (tokens - tied).amax(1) + counts).logsumexp(0)
        loss = torch.stack([part.error(tied, step_of_inputs) for part in parts]).logsumexp(0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return _centred(site.tie(logarithm.detach().exp()).log())


class _Logarithms:
    """A part of a site as the descent sees it, all in logarithms: what its errors cost, relative to the others'."""

    def __init__(self, part: SitePart, cost: Tensor) -> None:
        weight = part.weight
        step = max(1, len(weight) // ROWS)
        self._columns = weight.square().sum(0).clamp(min=1e-20).log()
        self._rows = weight[::step].abs().clamp(min=1e-12).log()
        self._of_rows = torch.tensor(len(weight) / len(self._rows)).log()
        self._cost = cost.clamp(min=1e-20).log()
        self._rounds_inputs = part.scheme.input_quantizer is not None

    def error(self, scale: Tensor, step_of_inputs: Tensor) -> Tensor:
        steps = (2 * (self._rows + scale).amax(1)).logsumexp(0) + self._of_rows
        weights = steps + (self._cost - 2 * scale).logsumexp(0)
        if not self._rounds_inputs:
            return weights
        return torch.logaddexp(step_of_inputs + (self._columns + 2 * scale).logsumexp(0), weights)


def _pair_error(site: Site, scale: Tensor) -> float:
    """The output's squared error when inputs and weights are really rounded under a scale."""
    assert site.inputs is not None
    error = 0.0
    inputs = site.inputs / scale
    counts = _token_weights(site.inputs) / len(inputs)
    for part, cost in zip(site.parts, _costs(site), strict=True):
        blocks = diagonal_blocks(cost, part.scheme.width(len(scale)))
        step = max(1, len(part.weight) // ROWS)
        rows = part.weight[::step] * scale
        error += part.scheme.trial_error(rows, blocks / scale.view(blocks.shape).square()) * step
        quantizer = part.scheme.input_quantizer
        if quantizer is not None:
            fixed = quantizer.calibrated(inputs.abs().amax(0), inputs)
            off = quantizer.round(inputs, fixed) - inputs
            error += float((off @ rows.T).square().sum(1) @ counts) * step
    return error


def _token_weights(rows: Tensor) -> Tensor:
    """How much each token's rounding counts, (tokens,): one that is far larger than most counts as one of them.

    The next norm divides what a token holds by its size, so that an error counts for what it is of the token. Without
    this the few attention sinks, hundreds of times as large, would decide alone.
    """
    size = rows.square().sum(1)
    typical = size.median().clamp(min=1e-20)
    return typical / (size + typical) * 2


def _costs(site: Site) -> list[Tensor]:
    """What an error in each column of each part costs, (in,), once tokens count as `_token_weights` says."""
    assert site.inputs is not None
    squares, counts = site.inputs.square(), _token_weights(site.inputs)
    part_that_counts = (counts @ squares) / squares.sum(0).clamp(min=1e-12)
    diagonals = (part.cost if part.cost.dim() == 1 else part.cost.diagonal() for part in site.parts)
    return [diagonal * part_that_counts for diagonal in diagonals]
