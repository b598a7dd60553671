"""Scales folded into what comes before a linear: a norm, or rows of another linear.

Dividing the output channels of an operation by `s` and multiplying the columns of all that reads them by `s` leaves
the function as it is. What the operation's dtype rounds away is put into the scale, so that folding itself loses
nothing.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit_quantize.model.architecture import Fold
from lowbit_quantize.model.spread import Spread


def divide_norm(norm: Any, scale: Tensor, offset: float) -> Tensor:
    """Divide what a norm multiplies by; returns the scale, (channels,), that it really was divided by."""
    before = norm.weight.float() + offset
    stored = (before / scale - offset).to(norm.weight.dtype)
    after = stored.float() + offset
    usable = (after != 0) & torch.isfinite(after) & (before != 0)
    norm.weight = nn.Parameter(torch.where(usable, stored, norm.weight), requires_grad=False)
    return torch.where(usable, before / after, torch.ones_like(scale))


def multiply_columns(module: Any, scale: Tensor) -> None:
    """Multiply the columns of a linear that is not quantized, in its own dtype."""
    widened = (module.weight.float() * scale).to(module.weight.dtype)
    module.weight = nn.Parameter(widened, requires_grad=False)


def divide_bias(linear: nn.Linear, rows: Tensor, divisor: Tensor) -> None:
    """Divide some entries of a linear's bias, if it has one."""
    if linear.bias is not None:
        bias = linear.bias.float()
        bias[rows] /= divisor
        linear.bias = nn.Parameter(bias.to(linear.bias.dtype), requires_grad=False)


def tied(channels: Tensor, spread: Spread) -> Tensor:
    """Replace each of the columns that share a producer's channel, (columns,), by their geometric mean."""
    if spread.repeats == 1:
        return channels
    blocks = channels.view(spread.heads, spread.repeats, -1).clamp(min=1e-8).log()
    return blocks.mean(1, keepdim=True).exp().expand(-1, spread.repeats, -1).flatten()


def divisor_of(fold: Fold, scale: Tensor) -> Tensor:
    """What the producer's channels are divided by, (heads · width,), where columns are, by a tied `scale`."""
    spread = fold.spread
    once = scale.view(spread.heads, spread.repeats, -1)[:, 0].flatten()
    return once if fold.power == 1 else once.pow(1 / fold.power)
