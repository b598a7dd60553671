"""Error compensation: a weight aims not at its original, but at what makes up for the error of the layers before.

A linear of the compressed model reads x̃ where the base model's reads x, and what it gives is added to a residual
stream that is r̃ instead of r. The weight T that comes nearest to what the base model has after the addition minimizes
`E‖r̃ + T x̃ − (r + W x)‖²`, so T = W + (W D + R) H⁻¹ with H = E[x̃ x̃ᵀ], D = E[(x − x̃) x̃ᵀ] and R = E[(r − r̃) x̃ᵀ]. Aiming
GPTQ at what the base model's inputs give is GPTAQ's idea (Li et al. 2025, arXiv 2504.02692); the residual stream's
own error is added here. R is there only where a linear's output is added to the stream as it is
(`LinearGroup.residual`).

H⁻¹ also fits what is peculiar to the calibration text. So the tokens are summed in two halves. Along the principal
components u of the inputs, of one size each, either half tells by itself what every output wants of them. What the
halves say of u_k agrees to a share r_k (their inner product over the mean of their squares, over all outputs). Of what
both say together, 2 r_k / (1 + r_k) is to be expected again on other text (Spearman 1910, Brown 1910); that share is
taken, as James and Stein (1961) shrink means, times a step. Batches take turns in which of their halves goes to which
sum: where domains lie in turns, either has all of them. A small ridge keeps the smallest components defined. Of many
inputs the components are found block by block, the largest inputs first, of what the blocks before leave: of the blocks
on the diagonal of L, H = L Lᵀ. docs/log.md has what each gave. Tokens count as they do in H, by the attention they
receive where that matters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lowbit_core.errors import NumericsError
from lowbit_quantize.device import ranks
from lowbit_quantize.device.factors import cholesky_in_place, ordered
from lowbit_quantize.device.parallel import one_thread

STEP = 0.7
RIDGE = 0.01  # of the mean of diag H
# Of H towards its diagonal; the next where it is not definite, as products are rounded (hessian.py).
SHRINKAGE = (0.02, 0.1, 0.5)
COMPONENT_BLOCK = 512  # inputs whose principal components are found together
DEALT_ROWS = 1024  # that are worked on at once, by one rank

Halves = tuple[Tensor, Tensor]


class Drift:
    """How far the inputs of a linear, and the residual stream that it adds to, are from the base model's.

    `weights` are those of the linears that share the inputs, one below the other (out, features), and `divisor`,
    (features,), is what the compressed model's inputs are divided by, where an AWQ scale was folded into the linear
    before. For each batch of tokens: `expect` and, with `residual`, `expect_residual` take what the base model has,
    then `see_residual` and `add` what the compressed model has. Where tokens count by attention, `weigh` follows.
    `base` is the base model's linear where it reads more than this one, which has been pruned.

    Where the linears give less than they read, W D + R is summed, (out, features), and D never made.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        divisor: Tensor | None = None,
        attended: bool = False,
        residual: bool = False,
        base: nn.Linear | None = None,
        bias: Tensor | None = None,
    ) -> None:
        self.attended, self._divisor = attended, divisor
        self._base, self._bias = base, bias
        features, outputs = weights[0].shape[1], sum(map(len, weights))
        self._weight: Tensor | None = None
        if residual or base is not None or 2 * outputs <= features:
            weight = torch.cat(tuple(weights)) if len(weights) > 1 else weights[0]
            self._weight = weight if divisor is None else (weight * divisor).to(weight.dtype)
        rows = features if self._weight is None else outputs
        device = weights[0].device
        self._sums: Halves | None = (
            torch.zeros(rows, features, device=device),
            torch.zeros(rows, features, device=device),
        )
        self._tokens = 0
        self._expected: Tensor | None = None
        self._residual_off: Tensor | None = None
        self._waiting: Tensor | None = None

    @property
    def waiting(self) -> bool:
        return self._waiting is not None

    @property
    def _blocks(self) -> list[slice]:
        assert self._sums is not None
        return _row_blocks(len(self._sums[0]))

    def expect(self, inputs: Tensor) -> None:
        """Take the base model's inputs, (tokens, features)."""
        if self._base is not None:
            self._expected = nn.functional.linear(inputs, self._base.weight, self._base.bias)
            return
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
        if inputs is None or self._expected is None or self._sums is None:
            return
        moved = None if self._base is not None else (self._expected - inputs).to(inputs.dtype)
        middle = len(inputs) // 2
        for rows in ranks.own(self._blocks):
            off = self._off(rows, inputs, moved)
            if received is not None:
                off = (off * ((1 + received) / 2).unsqueeze(1)).to(inputs.dtype)
            for total, half in zip(self._sums, (slice(None, middle), slice(middle, None)), strict=True):
                total[rows] += _products(off[half], inputs[half])
        self._tokens += len(inputs)
        self._sums = self._sums[::-1]
        self._expected = self._residual_off = None

    def _off(self, rows: slice, inputs: Tensor, moved: Tensor | None) -> Tensor:
        """How far some inputs, or what the linears give for all, are from the base model's, (tokens, …).

        `moved` is by how much the base model's inputs differ, where they are as many.
        """
        if moved is not None and self._weight is None:
            return moved[:, rows]
        assert self._weight is not None
        if moved is not None:
            off = nn.functional.linear(moved, self._weight[rows])
        else:
            assert self._expected is not None
            bias = None if self._bias is None else self._bias[rows]
            off = self._expected[:, rows] - nn.functional.linear(inputs, self._weight[rows], bias)
        return off if self._residual_off is None else off.add_(self._residual_off[:, rows])

    def target(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """The weight to quantize instead of `weight`, (out, in), on inputs of this Hessian (in, in); once.

        What was gathered goes here, before the factor of the Hessian needs as much memory.
        """
        self.weigh(None)
        assert self._sums is not None, "a drift gives one target"
        for total in self._sums:
            mine = [total[rows] for rows in ranks.own(self._blocks)]
            for rows, block in zip(self._blocks, ranks.in_order(mine, total.device), strict=True):
                total[rows] = block
            total.div_(max(1, self._tokens))
        halves, inside = self._sums, self._weight is None
        self._sums = self._weight = None
        order, lower = _ordered_factor(hessian)
        turns = _principal(lower)

        def told(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            """What both halves say of some outputs, and how far they agree: their products and squares."""
            wanted = ((weight[rows] @ half if inside else half[rows])[:, order].T for half in halves)
            first, second = (
                _turned(turns, torch.linalg.solve_triangular(lower, half, upper=False)) for half in wanted
            )
            squares = first.square().sum(1) + second.square().sum(1)
            return first + second, (first * second).sum(1), squares

        blocks = _row_blocks(len(weight))
        said, products, squares = zip(*ranks.spread(told, blocks, weight.device), strict=True)
        share = _expected_again(torch.stack(products).sum(0), torch.stack(squares).sum(0)) * STEP

        def aimed(number: int) -> Tensor:
            found = weight[blocks[number]].clone()
            taken = _turned([turn.T for turn in turns], said[number] * share.unsqueeze(1))
            wanted = torch.linalg.solve_triangular(lower.T, taken, upper=True)
            found[:, order] += wanted.T
            return found

        return torch.cat(ranks.spread(aimed, range(len(blocks)), weight.device))


def _products(off: Tensor, inputs: Tensor) -> Tensor:
    """Σ off inputsᵀ over tokens; of bfloat16 numbers rounded as they are, half the time where there is no AMX."""
    if inputs.dtype != torch.bfloat16:
        off, inputs = off.float(), inputs.float()
    return off.T @ inputs


def _ordered_factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs by falling H_jj, and the lower L of L Lᵀ = H', shrunk, + ridge in this order; raises NumericsError."""
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    for shrinkage in SHRINKAGE:
        lower = ordered(hessian.unsqueeze(0), order.unsqueeze(0))[0].mul_(1 - shrinkage)
        lower.diagonal().copy_(diagonal[order] + RIDGE * diagonal.mean().clamp(min=1e-12))
        lower, failed = cholesky_in_place(lower)
        if not failed:
            return order, lower
        del lower  # before there is another
    raise NumericsError(f"an input Hessian cannot be factored with a ridge of {RIDGE} of its mean")


def _principal(lower: Tensor) -> list[Tensor]:
    """What turns L⁻¹ x into principal components, each of variance one: a rotation of each block of inputs."""

    def turn(start: int) -> Tensor:
        block = lower[start : start + COMPONENT_BLOCK, start : start + COMPONENT_BLOCK].tril()
        covariance = block @ block.T
        with one_thread():
            variances, vectors = torch.linalg.eigh(covariance)
        turned: Tensor = vectors.T @ block / variances.clamp(min=1e-30).sqrt().unsqueeze(1)
        return turned

    starts = range(0, len(lower), COMPONENT_BLOCK)
    return ranks.in_order([turn(start) for start in ranks.own(starts)], lower.device)


def _turned(turns: list[Tensor], numbers: Tensor) -> Tensor:
    """(features, outputs), block by block."""
    parts = numbers.split([len(turn) for turn in turns])
    return torch.cat([turn @ part for turn, part in zip(turns, parts, strict=True)])


def _expected_again(products: Tensor, squares: Tensor) -> Tensor:
    """The share of what two halves say together that other text will say too, of their products and squares."""
    agreement = (2 * products / squares.clamp(min=1e-30)).clamp(0, 1)
    return 2 * agreement / (1 + agreement)


def _row_blocks(count: int) -> list[slice]:
    return [slice(start, min(start + DEALT_ROWS, count)) for start in range(0, count, DEALT_ROWS)]
