"""The Hessian of a linear's output error, H = E[x xᵀ] over calibration tokens (up to the usual factor of 2)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_quantize.device import ranks
from lowbit_quantize.device.precision import exact_products, rounds_products

SYMMETRIC_BLOCKS = 6  # blocks of a Hessian, if it is so wide that they cost less than they save:
WIDE = 1024
TOKEN_MULTIPLE = (
    128  # experts see any number of tokens; torch's CPU products compile a kernel for each new shape
)


class Hessian:
    """`H`, the mean of x xᵀ over tokens, in float32, for inputs of `features` channels.

    Of a wide one only blocks on and above the diagonal are computed (7/12 of the products for six blocks). It is
    the largest matrix of a run: the mean takes the sum's place. Where that halves the price, each batch's sum of
    bfloat16 products is rounded to bfloat16: who factors H shrinks it towards its diagonal, so that it stays definite.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self._sum = torch.zeros(features, features, device=device)
        self._block = -(-features // SYMMETRIC_BLOCKS) if features >= WIDE else features
        self._shared = ranks.count() > 1 and features >= WIDE
        self._finished = False
        self.tokens = 0

    @property
    def _starts(self) -> range:
        """Where blocks begin."""
        return range(0, self.features, self._block)

    @property
    def features(self) -> int:
        return len(self._sum)

    def add(self, inputs: Tensor) -> None:
        """Add (tokens, features); not after `matrix`."""
        assert not self._finished, "a finished mean takes no more tokens"
        rounds = rounds_products(inputs)
        wide = inputs if rounds else inputs.float()
        if extra := -len(wide) % TOKEN_MULTIPLE:
            wide = torch.cat([wide, wide.new_zeros(extra, wide.shape[1])])
        with exact_products(inputs.dtype):
            for start in ranks.own(_evenly(self._starts, ranks.count())) if self._shared else self._starts:
                stop = start + self._block
                total, left, right = self._sum[start:stop, start:], wide[:, start:stop].T, wide[:, start:]
                total.add_(left @ right) if rounds else total.addmm_(left, right)
        self.tokens += len(inputs)

    def matrix(self) -> Tensor:
        """The mean of x xᵀ, (features, features); the same tensor each time, not to be changed."""
        if self._finished:
            return self._sum
        self._finished = True
        if self._shared:
            self._gather()
        for start in self._starts:
            stop = start + self._block
            self._sum[stop:, start:stop] = self._sum[start:stop, stop:].T
            corner = self._sum[start:stop, start:stop]
            corner.copy_(corner.triu() + corner.triu(1).T)
        return self._sum.div_(max(1, self.tokens))

    def _gather(self) -> None:
        """Get the blocks that other ranks have."""
        starts = _evenly(self._starts, ranks.count())
        mine = [self._sum[start : start + self._block, start:] for start in ranks.own(starts)]
        for start, block in zip(starts, ranks.in_order(mine, self._sum.device), strict=True):
            self._sum[start : start + self._block, start:] = block

    def divide(self, scale: Tensor) -> None:
        """Make it that of inputs which are divided by `scale`, (features,)."""
        self.matrix().div_(scale.unsqueeze(0)).div_(scale.unsqueeze(1))


def _evenly(starts: Sequence[int], among: int) -> list[int]:
    """Blocks, of which the first is the largest, in an order that deals about as much to each: there and back."""
    rounds = [list(starts[first : first + among]) for first in range(0, len(starts), among)]
    return [
        start for number, one in enumerate(rounds) for start in (reversed(one) if number % 2 == 1 else one)
    ]


class AttendedHessian(Hessian):
    """A Hessian whose tokens count by the attention they receive (attention.py), known after each batch."""

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__(features, device)
        self._waiting: Tensor | None = None

    @property
    def waiting(self) -> bool:
        return self._waiting is not None

    def add(self, inputs: Tensor) -> None:
        """Take (tokens, features); they are added when their attention is known, or once each if it never is."""
        self.weigh(None)
        self._waiting = inputs

    def weigh(self, received: Tensor | None) -> None:
        """Add what waits, with the attention that each of its tokens receives, (tokens,), relative to the mean."""
        inputs, self._waiting = self._waiting, None
        if inputs is None:
            return
        if received is not None:
            root = ((1 + received) / 2).sqrt().unsqueeze(1)
            inputs = (inputs.float() * root).to(
                inputs.dtype
            )  # rounded first, so that the products stay exact
        super().add(inputs)

    def matrix(self) -> Tensor:
        """The mean of x xᵀ, (features, features), tokens counted by attention."""
        self.weigh(None)
        return super().matrix()


def output_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """`tr(D H Dᵀ)`: the mean squared output error of a weight that is off by D (out, in) on inputs of this Hessian."""
    return ((difference @ hessian) * difference).sum()
