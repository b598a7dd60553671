"""A sample of the rows that pass by."""

import torch
from torch import Tensor


class Sample:
    """Up to `size` rows, spread evenly over all that were added."""

    def __init__(self, size: int) -> None:
        self._size, self._rows, self._stride = size, torch.zeros(0, 0), 1

    @property
    def device(self) -> torch.device:
        return self._rows.device

    def add(self, rows: Tensor) -> None:
        kept = rows[:: self._stride]
        self._rows = torch.cat([self._rows, kept]) if len(self._rows) else kept.clone()
        while len(self._rows) > self._size:
            self._rows, self._stride = self._rows[::2].clone(), 2 * self._stride

    def divide(self, scale: Tensor) -> None:
        """Divide all rows by `scale`, (features,), in their own type."""
        self._rows = (self._rows.float() / scale).to(self._rows.dtype)

    def rows(self) -> Tensor:
        return self._rows
