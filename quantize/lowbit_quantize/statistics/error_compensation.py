"""Error compensation: a weight aims not at its original, but at what makes up for the error of the layers before.

A linear of the compressed model reads x̃ where the base model's reads x, and what it gives is added to a residual
stream that is r̃ instead of r. The weight T that comes nearest to what the base model has after the addition minimizes
`E‖r̃ + T x̃ − (r + W x)‖²`, so T = W + (W D + R) H⁻¹ with H = E[x̃ x̃ᵀ], D = E[(x − x̃) x̃ᵀ] and R = E[(r − r̃) x̃ᵀ]. Aiming
GPTQ at what the base model's inputs give is GPTAQ's idea (Li et al. 2025, arXiv 2504.02692); the residual stream's
own error is added here. R is there only where a linear's output is added to the stream as it is
(`LinearGroup.residual`).

Two things hold it back, because H⁻¹ also fits what is peculiar to the calibration text: a ridge, and half a step
(docs/log.md has what each gave). Tokens count as they do in H, by the attention they receive where that matters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lowbit_core.errors import NumericsError
from lowbit_quantize.device import ranks
from lowbit_quantize.device.precision import exact_products

STEP = 0.5
RIDGE = 0.05  # of the mean of diag H
DEALT_ROWS = 1024  # that are worked on at once, by one rank


class Drift:
    """How far the inputs of a linear, and the residual stream that it adds to, are from the base model's.

    `weights` are those of the linears that share the inputs, one below the other (out, features), and `divisor`,
    (features,), is what the compressed model's inputs are divided by, where an AWQ scale was folded into the linear
    before. For each batch of tokens: `expect` and, with `residual`, `expect_residual` take what the base model has,
    then `see_residual` and `add` what the compressed model has. Where tokens count by attention, `weigh` follows.

    Where the linears give less than they read, W D + R is summed, (out, features), and D never made.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        divisor: Tensor | None = None,
        attended: bool = False,
        residual: bool = False,
    ) -> None:
        self.attended, self._divisor = attended, divisor
        features, outputs = weights[0].shape[1], sum(map(len, weights))
        self._weight: Tensor | None = None
        if residual or 2 * outputs <= features:
            weight = torch.cat(tuple(weights)) if len(weights) > 1 else weights[0]
            self._weight = weight if divisor is None else (weight * divisor).to(weight.dtype)
        rows = features if self._weight is None else outputs
        self._sum: Tensor | None = torch.zeros(rows, features, device=weights[0].device)
        self._tokens = 0
        self._expected: Tensor | None = None
        self._residual_off: Tensor | None = None
        self._waiting: Tensor | None = None

    @property
    def waiting(self) -> bool:
        return self._waiting is not None

    @property
    def _blocks(self) -> list[slice]:
        assert self._sum is not None
        return _row_blocks(len(self._sum))

    def expect(self, inputs: Tensor) -> None:
        """Take the base model's inputs, (tokens, features)."""
        if self._divisor is not None:
            inputs = torch.div(inputs, self._divisor)
        # Some models attend to the hidden states themselves, which may have moved on before what waits is read.
        self._expected = inputs.clone() if self.attended else inputs

    def expect_residual(self, residual: Tensor) -> None:
        """Take the base model's residual stream, (tokens, hidden)."""
        self._residual_off = residual.clone()

    def see_residual(self, residual: Tensor) -> None:
        """Take the compressed model's residual stream for the same tokens."""
        if self._residual_off is not None:
            self._residual_off.sub_(residual)

    def add(self, inputs: Tensor) -> None:
        """Take the compressed model's inputs for the same tokens; where they count by attention, they wait for it."""
        self.weigh(None)
        self._waiting = inputs
        if not self.attended:
            self.weigh(None)

    def weigh(self, received: Tensor | None) -> None:
        """Add what waits, with the attention that each token receives, (tokens,), relative to the mean.

        Differences are rounded as inputs are, which is enough for a mean.
        """
        inputs, self._waiting = self._waiting, None
        if inputs is None or self._expected is None or self._sum is None:
            return
        off = (self._expected - inputs).to(inputs.dtype)
        if self._weight is not None:
            off = nn.functional.linear(off, self._weight)
            if self._residual_off is not None:
                off += self._residual_off
        wide = off.float()
        if received is not None:
            wide *= ((1 + received) / 2).unsqueeze(1)
        with exact_products(inputs.dtype):
            for rows in ranks.own(self._blocks):
                self._sum[rows].addmm_(wide[:, rows].T, inputs.float())
        self._tokens += len(inputs)
        self._expected = self._residual_off = None

    def target(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """The weight to quantize instead of `weight`, (out, in), on inputs of this Hessian (in, in); once.

        What was gathered goes here, before the factor of the Hessian needs as much memory.
        """
        self.weigh(None)
        assert self._sum is not None, "a drift gives one target"
        mine = [self._sum[rows] for rows in ranks.own(self._blocks)]
        for rows, block in zip(self._blocks, ranks.in_order(mine, self._sum.device), strict=True):
            self._sum[rows] = block
        off, inside = self._sum.div_(max(1, self._tokens)), self._weight is None
        self._sum = self._weight = None
        lower = hessian.clone()
        lower.diagonal().add_(RIDGE * hessian.diagonal().mean().clamp(min=1e-12))
        lower, failed = torch.linalg.cholesky_ex(lower)
        if failed:
            raise NumericsError(f"an input Hessian cannot be factored with a ridge of {RIDGE} of its mean")

        def aimed(rows: slice) -> Tensor:
            wanted = weight[rows] @ off if inside else off[rows]
            found: Tensor = weight[rows] + STEP * torch.cholesky_solve(wanted.T, lower).T
            return found

        return torch.cat(ranks.spread(aimed, _row_blocks(len(weight)), weight.device))


def _row_blocks(count: int) -> list[slice]:
    return [slice(start, min(start + DEALT_ROWS, count)) for start in range(0, count, DEALT_ROWS)]
