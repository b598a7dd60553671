"""Scales folded into what comes before a linear: a norm, or the last rows of another linear.

Dividing the output channels of an operation by `s` and multiplying the columns of all that reads them by `s` leaves
the function as it is. What the operation's dtype rounds away is put into the scale, so that folding itself loses
nothing.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit_quantize.model.architecture import Architecture, LinearGroup

Heads = tuple[int, int]  # key and value heads, and the query heads that share each


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


def divide_bias(linear: nn.Linear, divisor: Tensor) -> None:
    """Divide the last entries of a linear's bias, if it has one."""
    if linear.bias is not None:
        bias = linear.bias.float()
        bias[-len(divisor) :] /= divisor
        linear.bias = nn.Parameter(bias.to(linear.bias.dtype), requires_grad=False)


def heads_between(
    layer: nn.Module, architecture: Architecture, group: LinearGroup, inputs: int
) -> Heads | None:
    """How channels of the linear before a group feed its inputs; None where they are clamped in between."""
    if group.fold != "kv_rows":
        return 1, 1
    attention: Any = layer.get_submodule(architecture.attention)
    if getattr(attention.config, "clip_qkv", None) is not None:
        return None  # dividing values that are clamped would change the function
    repeats = attention.num_key_value_groups
    return inputs // (repeats * attention.head_dim), repeats


def shared_by_heads(channels: Tensor, heads: Heads) -> Tensor:
    """Replace each channel of the query heads that share a value channel by their geometric mean."""
    if heads[1] == 1:
        return channels
    grouped = channels.view(heads[0], heads[1], -1).clamp(min=1e-8).log()  # (kv_heads, repeats, head_dim)
    return grouped.mean(1, keepdim=True).exp().expand(-1, heads[1], -1).flatten()
