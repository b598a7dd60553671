"""Statistics of one layer, gathered in one pass: covariances of inputs, and the reach of keys and values."""

import torch
from torch import Tensor

from lowbit_quantize.precision import exact_products

SYMMETRIC_BLOCKS = 6


class Covariance:
    """`H`, the mean of x xᵀ over tokens, in float32, for inputs of `features` channels.

    Only blocks on and above the diagonal are computed (7/12 of the products for six blocks).
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self._sum = torch.zeros(features, features, device=device)
        self._block = -(-features // SYMMETRIC_BLOCKS)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add (tokens, features)."""
        wide = inputs.float()
        with exact_products(inputs.dtype):
            for start in range(0, wide.shape[1], self._block):
                stop = start + self._block
                self._sum[start:stop, start:].addmm_(wide[:, start:stop].T, wide[:, start:])
        self.tokens += len(inputs)

    def matrix(self) -> Tensor:
        """The mean of x xᵀ, (features, features)."""
        upper = self._sum.triu()
        return (upper + upper.triu(1).T) / max(1, self.tokens)


class KeyValueReach:
    """Largest |key| of a layer and largest |value| of each value channel, as handed to the cache."""

    def __init__(self) -> None:
        self.key = torch.zeros(())
        self.value = torch.zeros(())

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A cache seam: keys and values are (batch, kv_heads, tokens, head_dim) and pass unchanged."""
        self.key = torch.maximum(self.key.to(keys.device), keys.abs().amax().float())
        channels = values.abs().amax(dim=(0, 2)).float()  # (kv_heads, head_dim)
        self.value = torch.maximum(self.value.to(values.device), channels.reshape(-1))
        return keys, values
