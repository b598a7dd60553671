"""What a linear reads, as its mean and its Hessian: of two halves of the tokens, so that one can judge the other.

Where the base model walks too, also how far what the linear gives is from the base's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_quantize.device.precision import exact_products


class Moments:
    """Mean x and mean x xᵀ over tokens, float32, of inputs of `features` channels, in two halves."""

    def __init__(self, features: int, device: torch.device) -> None:
        self._second = torch.zeros(2, features, features, device=device)
        self._first = torch.zeros(2, features, device=device)
        self._tokens = [0, 0]
        self._turn = 0, 1  # which half takes the first tokens of a batch, and the rest

    def add(self, inputs: Tensor) -> None:
        """Take (tokens, features), half of them each; batches take turns: where domains lie in turns, both have all."""
        wide, middle = inputs.float(), len(inputs) // 2
        for half, rows in zip(self._turn, (wide[:middle], wide[middle:]), strict=True):
            with exact_products(inputs.dtype):
                self._second[half].addmm_(rows.T, rows)
            self._first[half] += rows.sum(0)
            self._tokens[half] += len(rows)
        self._turn = self._turn[::-1]

    @property
    def tokens(self) -> int:
        return sum(self._tokens)

    @property
    def hessian(self) -> Tensor:
        """Mean x xᵀ of all tokens, (features, features)."""
        return self._second.sum(0) / max(1, self.tokens)

    @property
    def mean(self) -> Tensor:
        """Mean x of all tokens, (features,)."""
        return self._first.sum(0) / max(1, self.tokens)

    def half(self, number: int) -> tuple[Tensor, Tensor]:
        """Hessian and mean of one half."""
        tokens = max(1, self._tokens[number])
        return self._second[number] / tokens, self._first[number] / tokens


def centred(hessian: Tensor, mean: Tensor) -> Tensor:
    """The covariance: the Hessian of what a bias cannot make up for."""
    return hessian - torch.outer(mean, mean)


class Aim(Moments):
    """The moments of what a linear reads, and how far its output is from the base model's, which it may make up for.

    With x_b and r_b what the linear reads and what its output is added to in the base model, x and r the same here, it
    is off by W (x_b − x) + r_b − r for a token: what is kept is the mean of that times xᵀ, itself, and its power.
    """

    def __init__(self, weight: Tensor) -> None:
        """`weight` is the linear's, (out, features)."""
        outputs, features = weight.shape
        super().__init__(features, weight.device)
        self._weight = weight
        self._cross = torch.zeros(2, outputs, features, device=weight.device)
        self._off = torch.zeros(2, outputs, device=weight.device)
        self._power = [0.0, 0.0]
        self._expected: Tensor | None = None
        self._residual: Tensor | None = None

    def expect(self, inputs: Tensor) -> None:
        """Take what the base model's linear reads, (tokens, features)."""
        self._expected = inputs.clone()

    def expect_residual(self, residual: Tensor) -> None:
        """Take the base model's residual stream, (tokens, out)."""
        self._residual = residual.float()

    def see_residual(self, residual: Tensor) -> None:
        """Take the residual stream here, of the same tokens."""
        if self._residual is not None:
            self._residual = self._residual - residual

    def add(self, inputs: Tensor) -> None:
        """Take what the linear reads here, of the same tokens."""
        assert self._expected is not None, "the base model's inputs come first"
        off = torch.nn.functional.linear(
            (self._expected - inputs).to(self._weight.dtype), self._weight
        ).float()
        off = off if self._residual is None else off + self._residual
        rounded, middle = off.to(inputs.dtype).float(), len(inputs) // 2
        for half, rows in zip(self._turn, (slice(None, middle), slice(middle, None)), strict=True):
            with exact_products(inputs.dtype):
                self._cross[half].addmm_(rounded[rows].T, inputs[rows].float())
            self._off[half] += rounded[rows].sum(0)
            self._power[half] += float(rounded[rows].square().sum(dtype=torch.float64))
        self._expected = self._residual = None
        super().add(inputs)

    def off(self, half: int | None) -> "Off":
        """What one half of the tokens says of it, or all say."""
        halves = [0, 1] if half is None else [half]
        tokens = max(1, sum(self._tokens[one] for one in halves))
        return Off(
            self._cross[halves].sum(0) / tokens,
            self._off[halves].sum(0) / tokens,
            sum(self._power[one] for one in halves) / tokens,
        )


@dataclass(frozen=True)
class Off:
    """Mean off xᵀ, (out, features), mean off, (out,), and mean ‖off‖²."""

    cross: Tensor
    mean: Tensor
    power: float
