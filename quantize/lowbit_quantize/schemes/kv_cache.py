"""FP8 keys and values: static scales of a layer or of its heads, and a KV-cache hook that rounds as served.

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
MAXIMUM, CLIP = "maximum", "clip"
CLIPS = tuple(2 ** (-step / 4) for step in range(9))  # 1 to 1/4, of the largest magnitude


@dataclass(frozen=True)
class KVScales:
    """Scales of one layer, or of each of its heads: the cache holds key / k_scale and value / v_scale in FP8."""

    k_scale: float | tuple[float, ...]
    v_scale: float | tuple[float, ...]
    k_source: str = MAXIMUM
    v_source: str = MAXIMUM

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A KV-cache hook that rounds keys and values to FP8 and back."""
        return _round(keys, self.k_scale), _round(values, self.v_scale)


def calibrated_scales(
    absmax: tuple[Tensor, Tensor],
    samples: tuple[Tensor, Tensor],
    value_divisor: Tensor | None,
    *,
    by_head: bool = False,
) -> KVScales:
    """The scales of a layer whose keys and values were seen before its value channels were divided.

    `absmax` is the largest |key| of each head, (heads,), and |value| of each channel, (channels,); `samples` are keys
    and values of some tokens, (tokens, channels).
    """
    (key, value), (key_sample, value_sample) = absmax, samples
    divisor = torch.ones_like(value) if value_divisor is None else value_divisor
    heads = len(key) if by_head else 1
    k_scales, k_source = _of_heads(key, key_sample, heads)
    v_scales, v_source = _of_heads(value / divisor, value_sample.float() / divisor, heads)
    if by_head:
        return KVScales(k_scales, v_scales, k_source, v_source)
    return KVScales(k_scales[0], v_scales[0], k_source, v_source)


def _of_heads(absmax: Tensor, sample: Tensor, heads: int) -> tuple[tuple[float, ...], str]:
    """The scale of each of so many heads, of which all have as many channels, and where they are from."""
    parts = sample.unflatten(1, (heads, -1)).unbind(1)
    found = [choose_scale(*one) for one in zip(absmax.chunk(heads), parts, strict=True)]
    clipped = sum(source == CLIP for _, source in found)
    source = MAXIMUM if not clipped else CLIP if clipped == heads else f"{CLIP} in {clipped} of {heads} heads"
    return tuple(scale for scale, _ in found), source


def choose_scale(absmax: Tensor, sample: Tensor) -> tuple[float, str]:
    """The scale under which `sample` rounds best, for tensors whose largest magnitude is `absmax`."""
    scales = [scale_of(absmax * clip) for clip in CLIPS]
    wide = sample.float()
    errors = [float((_round(wide, scale) - wide).square().sum(dtype=torch.float64)) for scale in scales]
    best = errors.index(min(errors))
    return scales[best], CLIP if best else MAXIMUM


def scale_of(absmax: Tensor) -> float:
    """The scale of values whose largest magnitude is `absmax`, as float32 holds it."""
    return float((absmax.float().max() / FP8_MAX).clamp(min=1e-8))


def _round(values: Tensor, scale: float | tuple[float, ...]) -> Tensor:
    """Of any values; where there is a scale for each head, of (batch, heads, tokens, head_dim)."""
    wide = scale if isinstance(scale, float) else torch.tensor(scale, device=values.device).view(-1, 1, 1)
    scaled = (values.float() / wide).clamp(-FP8_MAX, FP8_MAX)
    return (scaled.to(FP8).float() * wide).to(values.dtype)
