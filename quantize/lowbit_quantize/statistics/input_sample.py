"""What a linear reads, token by token: for schemes that round inputs, which no mean over tokens can tell."""

import torch
from torch import Tensor

from lowbit_quantize.statistics.sample import Sample

SAMPLED_TOKENS = 1024


class InputSample:
    """Some of the inputs of a linear, and the largest magnitude of each channel over all of them."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.absmax = torch.zeros(features, device=device)
        self._sample = Sample(SAMPLED_TOKENS)

    def add(self, inputs: Tensor) -> None:
        """Take (tokens, features)."""
        if len(inputs):
            torch.maximum(self.absmax, inputs.abs().amax(0), out=self.absmax)
            self._sample.add(inputs)

    def rows(self) -> Tensor:
        """The sample, (tokens, features), float32; no tokens where none were seen."""
        return self._sample.rows().float().view(-1, len(self.absmax))

    def with_more(self, inputs: Tensor) -> "InputSample":
        """Another sample of the same linear, of these (tokens, features) too."""
        together = InputSample(len(self.absmax), self.absmax.device)
        for rows in (inputs.float(), self.rows()):
            together.add(rows)
        torch.maximum(together.absmax, self.absmax, out=together.absmax)
        return together
