"""Weights that are stored as integers, as training sees them: rounded in the forward pass, and with gradients.

Codes that stay: `w = scale · (code − zero)` is linear in the scale, whose gradient is exact. Codes that move (LSQ,
Esser et al. 2020, arXiv 1902.08153): `w = scale · (round(clamp(v / scale + zero)) − zero)` of a weight v in float32.
Rounding passes the gradient on as if it were not there (Bengio et al. 2013, arXiv 1308.3432): v has that of w where it
is inside the range and none where it is clamped; the scale has code − zero − v / scale inside, and code − zero where v
is clamped.
Scales are read back in the type they are stored in, and `stored` rounds them so in every forward pass.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lowbit_quantize.schemes.integer import Integer
from lowbit_quantize.schemes.numbers.affine import stored
from lowbit_quantize.schemes.scheme import Quantized


class _Rounded(torch.autograd.Function):
    """A tensor as it is stored; its gradient passes as if it were not rounded."""

    @staticmethod
    def forward(context: Any, values: Tensor, dtype: torch.dtype | None) -> Tensor:
        return stored(values) if dtype is None else values.to(dtype).to(values.dtype)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def rounded(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers at the precision of `dtype`, or scales as they are stored, with the gradient passed straight through."""
    found: Tensor = _Rounded.apply(values, dtype)
    return found


class _LearnedSteps(torch.autograd.Function):
    """(out, groups, width) weights, (out, groups, 1) scales and zeros to rounded weights; codes are not kept."""

    @staticmethod
    def forward(context: Any, weight: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        context.save_for_backward(weight, scale, zero)
        context.range = low, high
        codes = (weight / scale).add_(zero).clamp_(low, high).round_()
        return codes.sub_(zero).mul_(scale)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, zero = context.saved_tensors
        low, high = context.range
        exact = weight / scale + zero
        inside = (exact >= low) & (exact <= high)
        of_scale = exact.clamp(low, high).round_().sub_(zero).sub_((exact - zero) * inside)
        found = (gradients[0] * of_scale).sum(-1, keepdim=True)
        return gradients[0] * inside, found, None, None, None


def learned_steps(weight: Tensor, scale: Tensor, zero: Tensor, scheme: Integer) -> Tensor:
    """A weight (out, in) as it would be stored under scales and zeros (out, groups), with the gradients of LSQ."""
    groups = scheme.split(weight)  # (out, groups, width)
    found: Tensor = _LearnedSteps.apply(
        groups, scale.unsqueeze(-1), zero.unsqueeze(-1), scheme.lowest, scheme.highest
    )
    return found.flatten(-2)


class IntegerLinear(nn.Module):
    """A linear whose weight is stored as integers. `codes_move`: the weight trains with its scales, else they alone.

    `scale`, (out, groups) in float32, is a parameter; zero points stay. The bias, if there is one, stays as it is.
    """

    zero: Tensor
    codes: Tensor
    bias: Tensor | None

    def __init__(self, quantized: Quantized, bias: Tensor | None, *, codes_move: bool) -> None:
        super().__init__()
        assert isinstance(quantized.scheme, Integer), "only affine integers are trained"
        self.scheme: Integer = quantized.scheme
        self.scale = nn.Parameter(quantized.params["scale"].float().clone())
        self.register_buffer("zero", quantized.params["zero"].float())
        self.register_buffer("bias", bias)
        if codes_move:
            self.latent = nn.Parameter(quantized.dequantize())
        else:
            self.register_buffer("codes", quantized.codes)
        self.codes_move = codes_move

    @property
    def weight(self) -> Tensor:
        """What engines compute with, (out, in), float32; it has gradients."""
        scale = rounded(self.scale)
        if self.codes_move:
            return learned_steps(self.latent, scale, self.zero, self.scheme)
        return self.scheme.dequantize(self.codes, {"scale": scale, "zero": self.zero})

    def forward(self, inputs: Tensor) -> Tensor:
        return linear(inputs, self.weight, self.bias)

    @torch.no_grad()
    def quantized(self) -> Quantized:
        """The codes and parameters that are stored."""
        params = {"scale": stored(self.scale), "zero": self.zero}
        codes = self.scheme.quantize(self.latent, params) if self.codes_move else self.codes
        return Quantized(codes, params, self.scheme)


class RoundedNorm(nn.Module):
    """A parametrization: a parameter in float32 that the module computes with in the type it is stored in."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, values: Tensor) -> Tensor:
        return rounded(values, self.dtype)
