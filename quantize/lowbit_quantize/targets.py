"""What a rounded weight aims at: not its original, but what makes up for the error of the layers before.

A linear of the compressed model reads x̃ where the base model's reads x, and what it gives is added to a residual
stream that is r̃ instead of r. The weight T that comes nearest to what the base model has after the addition minimizes
`E‖r̃ + T x̃ − (r + W x)‖²`, so T = W + (W D + R) H⁻¹ with H = E[x̃ x̃ᵀ], D = E[(x − x̃) x̃ᵀ] and R = E[(r − r̃) x̃ᵀ]. Aiming
GPTQ at what the base model's inputs give is GPTAQ's idea (Li et al. 2025, arXiv 2504.02692); the residual stream's
own error is added here. R is there only where a linear's output is added to the stream as it is
(`LinearGroup.residual`).

Two things hold it back, because H⁻¹ also fits what is peculiar to the calibration text: a ridge, and half a step
(docs/log.md has what each gave). Tokens count as they do in H, by the attention they receive where that matters.
"""

import torch
from torch import Tensor

from lowbit_core.errors import NumericsError
from lowbit_quantize.precision import exact_products

STEP = 0.5
RIDGE = 0.05  # of the mean of diag H


class Drift:
    """How far the inputs of a linear, and the residual stream that it adds to, are from the base model's.

    `divisor` (features,) is what the compressed model's inputs are divided by, where an AWQ scale was folded into the
    linear before. For each batch of tokens: `expect` and `expect_residual` with what the base model has, then
    `see_residual` and `add` with what the compressed model has. Where tokens count by attention, `weigh` follows.
    """

    def __init__(self, divisor: Tensor, *, attended: bool) -> None:
        self.attended, self._divisor = attended, divisor
        self._inputs: Tensor | None = divisor.new_zeros(len(divisor), len(divisor))
        self._residual: Tensor | None = None
        self._tokens = 0
        self._expected: Tensor | None = None
        self._residual_off: Tensor | None = None
        self._waiting: Tensor | None = None

    @property
    def waiting(self) -> bool:
        return self._waiting is not None

    def expect(self, inputs: Tensor) -> None:
        """Take the base model's inputs, (tokens, features)."""
        self._expected = torch.div(inputs, self._divisor)  # float32, as the divisor is

    def expect_residual(self, residual: Tensor) -> None:
        """Take the base model's residual stream, (tokens, hidden)."""
        self._residual_off = residual.float()

    def see_residual(self, residual: Tensor) -> None:
        """Take the compressed model's residual stream for the same tokens."""
        if self._residual_off is not None:
            self._residual_off = self._residual_off - residual.float()

    def add(self, inputs: Tensor) -> None:
        """Take the compressed model's inputs for the same tokens; where they count by attention, they wait for it."""
        self.weigh(None)
        self._waiting = inputs
        if not self.attended:
            self.weigh(None)

    def weigh(self, received: Tensor | None) -> None:
        """Add what waits, with the attention that each token receives, (tokens,), relative to the mean."""
        inputs, self._waiting = self._waiting, None
        if inputs is None or self._expected is None or self._inputs is None:
            return
        counts = None if received is None else ((1 + received) / 2).unsqueeze(1)
        wide = inputs.float()
        self._tokens += len(wide)
        with exact_products(
            inputs.dtype
        ):  # the differences are rounded to 8 bits, which is enough for a mean
            self._inputs.addmm_(_counted(self._expected.sub_(wide), counts).T, wide)
            if self._residual_off is not None:
                if self._residual is None:
                    self._residual = wide.new_zeros(self._residual_off.shape[1], wide.shape[1])
                self._residual.addmm_(_counted(self._residual_off, counts).T, wide)
        self._expected = self._residual_off = None

    def target(self, weight: Tensor, covariance: Tensor) -> Tensor:
        """The weight to round instead of `weight`, (out, in), on inputs of this covariance (in, in); once.

        What was gathered goes here, before the factor of the covariance needs as much memory.
        """
        self.weigh(None)
        assert self._inputs is not None, "a drift gives one target"
        off = weight @ self._inputs.div_(max(1, self._tokens))  # (out, in)
        if self._residual is not None:
            off += self._residual / max(1, self._tokens)
        self._inputs = self._residual = None
        lower = covariance.clone()
        lower.diagonal().add_(RIDGE * covariance.diagonal().mean().clamp(min=1e-12))
        lower, failed = torch.linalg.cholesky_ex(lower)
        if failed:
            raise NumericsError(f"an input covariance cannot be factored with a ridge of {RIDGE} of its mean")
        target: Tensor = weight + STEP * torch.cholesky_solve(off.T, lower).T
        return target


def _counted(off: Tensor, counts: Tensor | None) -> Tensor:
    """Rows as often as their tokens count, in place; wide layers leave no room for copies."""
    return off if counts is None else off.mul_(counts)
