"""FP8 keys and values: one static scale each per layer, and a cache seam that rounds as the served cache will.

The format is e4m3 (largest value 448). The scale maps the largest calibrated magnitude to that value; what is
larger at run time saturates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


@dataclass(frozen=True)
class KVScales:
    """Scales of one layer: the cache holds key / k_scale and value / v_scale in FP8."""

    k_scale: float
    v_scale: float

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A cache seam that rounds keys and values to FP8 and back."""
        return _round(keys, self.k_scale), _round(values, self.v_scale)


def scale_of(reach: Tensor) -> float:
    """The scale of values whose largest magnitude is `reach`, as float32 holds it."""
    return float((reach.float().max() / FP8_MAX).clamp(min=1e-8))


def _round(values: Tensor, scale: float) -> Tensor:
    scaled = (values.float() / scale).clamp(-FP8_MAX, FP8_MAX)
    return (scaled.to(FP8).float() * scale).to(values.dtype)
