"""Where a weight is zero: how many of its numbers, and a hash by which what is read back is held against it."""

import hashlib
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Zeros:
    """The share of zeros of a weight, and the SHA-256 of where they are: a bit a number, row by row."""

    share: float
    sha256: str


def zeros_of(weight: Tensor) -> Zeros:
    """Of a weight (out, in), whatever its type."""
    zero = (weight == 0).cpu()
    bits = np.packbits(zero.numpy())
    return Zeros(float(zero.sum()) / max(1, zero.numel()), hashlib.sha256(bits.tobytes()).hexdigest())
