"""FP8 keys and values: one static scale each per layer, and a KV-cache hook that rounds as the served cache will.

The format is e4m3 (largest value 448). A scale maps the largest calibrated magnitude to that value, or to a
larger one if saturating the largest few rounds the whole better: squared error decides, on a sample of tokens.
FP8 is a floating format, so its relative error hardly depends on the scale and the largest magnitude usually wins.
What is larger at run time saturates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
CLIPS = tuple(2 ** (-step / 4) for step in range(9))  # 1 to 1/4, of the largest magnitude


@dataclass(frozen=True)
class KVScales:
    """Scales of one layer: the cache holds key / k_scale and value / v_scale in FP8."""

    k_scale: float
    v_scale: float
    k_source: str = "maximum"
    v_source: str = "maximum"

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A KV-cache hook that rounds keys and values to FP8 and back."""
        return _round(keys, self.k_scale), _round(values, self.v_scale)


def calibrated_scales(
    absmax: tuple[Tensor, Tensor], samples: tuple[Tensor, Tensor], value_divisor: Tensor | None
) -> KVScales:
    """The scales of a layer whose keys and values were seen before its value channels were divided.

    `absmax` is the largest |key|, (), and |value| of each channel, (channels,); `samples` are keys and values of some
    tokens, (tokens, channels).
    """
    (key, value), (key_sample, value_sample) = absmax, samples
    divisor = torch.ones_like(value) if value_divisor is None else value_divisor
    k_scale, k_source = choose_scale(key, key_sample)
    v_scale, v_source = choose_scale(value / divisor, value_sample.float() / divisor)
    return KVScales(k_scale, v_scale, k_source, v_source)


def choose_scale(absmax: Tensor, sample: Tensor) -> tuple[float, str]:
    """The scale under which `sample` rounds best, for tensors whose largest magnitude is `absmax`."""
    scales = [scale_of(absmax * clip) for clip in CLIPS]
    wide = sample.float()
    errors = [float((_round(wide, scale) - wide).square().sum(dtype=torch.float64)) for scale in scales]
    best = errors.index(min(errors))
    return scales[best], "clip" if best else "maximum"


def scale_of(absmax: Tensor) -> float:
    """The scale of values whose largest magnitude is `absmax`, as float32 holds it."""
    return float((absmax.float().max() / FP8_MAX).clamp(min=1e-8))


def _round(values: Tensor, scale: float) -> Tensor:
    scaled = (values.float() / scale).clamp(-FP8_MAX, FP8_MAX)
    return (scaled.to(FP8).float() * scale).to(values.dtype)
