"""What a linear reads, as its mean and its Hessian: of two halves of the tokens, so that one can judge the other."""

import torch
from torch import Tensor

from lowbit_quantize.device.precision import exact_products


class Moments:
    """Mean x and mean x xᵀ over tokens, float32, of inputs of `features` channels, in two halves."""

    def __init__(self, features: int, device: torch.device) -> None:
        self._second = torch.zeros(2, features, features, device=device)
        self._first = torch.zeros(2, features, device=device)
        self._tokens = [0, 0]

    def add(self, inputs: Tensor) -> None:
        """Take (tokens, features); the first half of each batch is one half, the rest the other."""
        wide, middle = inputs.float(), len(inputs) // 2
        for half, rows in enumerate((wide[:middle], wide[middle:])):
            with exact_products(inputs.dtype):
                self._second[half].addmm_(rows.T, rows)
            self._first[half] += rows.sum(0)
            self._tokens[half] += len(rows)

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
