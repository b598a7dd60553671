"""The largest magnitudes of keys and values, and a sample of both, as they are handed to the cache."""

import torch
from torch import Tensor

SAMPLE_STRIDE = 4  # of the tokens whose keys and values are kept


class KVAbsmax:
    """Largest |key| of each head and |value| of each value channel, as handed to the cache; a sample of both."""

    observes = True

    def __init__(self) -> None:
        self.key = torch.zeros(())  # (kv_heads,), once something was seen
        self.value = torch.zeros(())
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A KV-cache hook: keys and values are (batch, kv_heads, tokens, head_dim) and pass unchanged."""
        self.key = torch.maximum(self.key.to(keys.device), keys.abs().amax(dim=(0, 2, 3)).float())
        channels = values.abs().amax(dim=(0, 2)).float()  # (kv_heads, head_dim)
        self.value = torch.maximum(self.value.to(values.device), channels.reshape(-1))
        self._keys.append(_sample(keys))
        self._values.append(_sample(values))
        return keys, values

    @property
    def cached(self) -> bool:
        """Whether the layer put anything into the cache; one that shares another's does not."""
        return bool(self._keys)

    @property
    def key_sample(self) -> Tensor:
        """Keys of every `SAMPLE_STRIDE`-th token, (sampled, kv_heads · head_dim)."""
        return torch.cat(self._keys)

    @property
    def value_sample(self) -> Tensor:
        """Values of every `SAMPLE_STRIDE`-th token, (sampled, kv_heads · head_dim)."""
        return torch.cat(self._values)


def _sample(heads: Tensor) -> Tensor:
    return heads[:, :, ::SAMPLE_STRIDE].transpose(1, 2).flatten(2).flatten(0, 1)
