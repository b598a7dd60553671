"""FP8 keys and values: one static scale each per layer, and a cache seam that rounds as the served cache will.

The format is e4m3 (largest value 448). A scale maps the largest calibrated magnitude to that value, or to a
larger one if saturating the largest few rounds the whole better: squared error decides, on a sample of tokens.
FP8 is a floating format, so its relative error hardly depends on the scale and the largest magnitude usually wins.
What is larger at run time saturates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_core.manifest import KVScaleSource
from lowbit_quantize.observe import KeyValueReach

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
CLIPS = tuple(2 ** (-step / 4) for step in range(9))  # 1 to 1/4, of the largest magnitude


@dataclass(frozen=True)
class KVScales:
    """Scales of one layer: the cache holds key / k_scale and value / v_scale in FP8."""

    k_scale: float
    v_scale: float
    k_source: KVScaleSource = "maximum"
    v_source: KVScaleSource = "maximum"

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A cache seam that rounds keys and values to FP8 and back."""
        return _round(keys, self.k_scale), _round(values, self.v_scale)


UNIT_SCALES = KVScales(
    1.0, 1.0, "unit", "unit"
)  # what engines run an FP8 cache with where a checkpoint carries no scales


def calibrated_scales(seen: KeyValueReach, value_divisor: Tensor | None) -> KVScales:
    """The scales of a layer whose keys and values were seen before its value channels were divided."""
    divisor = torch.ones_like(seen.value) if value_divisor is None else value_divisor
    k_scale, k_source = choose_scale(seen.key, seen.key_sample)
    v_scale, v_source = choose_scale(seen.value / divisor, seen.value_sample.float() / divisor)
    return KVScales(k_scale, v_scale, k_source, v_source)


def choose_scale(reach: Tensor, sample: Tensor) -> tuple[float, KVScaleSource]:
    """The scale under which `sample` rounds best, for tensors whose largest magnitude is `reach`."""
    scales = [scale_of(reach * clip) for clip in CLIPS]
    wide = sample.float()
    errors = [float((_round(wide, scale) - wide).square().sum(dtype=torch.float64)) for scale in scales]
    best = errors.index(min(errors))
    return scales[best], "clip" if best else "maximum"


def scale_of(reach: Tensor) -> float:
    """The scale of values whose largest magnitude is `reach`, as float32 holds it."""
    return float((reach.float().max() / FP8_MAX).clamp(min=1e-8))


def _round(values: Tensor, scale: float) -> Tensor:
    scaled = (values.float() / scale).clamp(-FP8_MAX, FP8_MAX)
    return (scaled.to(FP8).float() * scale).to(values.dtype)
