"""A quantized linear on its way down a loss: its codes and its scales are learned, straight through the rounding.

A code is the nearest integer to a number of its own, which begins at the code that a method chose; a step moves the
numbers of all weights by the same, against the sign of the gradient (SignRound, Cheng et al. 2023, arXiv 2309.05516).
So a code changes where batch after batch asks for it, and stays where they do not agree. Scales move by a share of
themselves, by Adam (Block-AP of EfficientQAT, Chen et al. 2024, arXiv 2407.11062, learns both, too). What engines will
compute with is what the loss is of: codes are whole, and scales are held as they are stored.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lowbit_quantize.schemes.integer import Integer
from lowbit_quantize.schemes.numbers.affine import stored
from lowbit_quantize.schemes.scheme import Params, Quantized

EDGE = 0.49  # how far beyond the last code its number may be


class Adam:
    """Kingma and Ba 2014, arXiv 1412.6980, for one tensor; gives the step by unit rate."""

    def __init__(self, like: Tensor, betas: tuple[float, float] = (0.9, 0.95)) -> None:
        self._mean, self._square = torch.zeros_like(like), torch.zeros_like(like)
        self._betas, self._steps = betas, 0

    def step(self, gradient: Tensor) -> Tensor:
        self._steps += 1
        first, second = self._betas
        self._mean.lerp_(gradient, 1 - first)
        self._square.lerp_(gradient.square(), 1 - second)
        unbiased = self._square.div(1 - second**self._steps).sqrt_().add_(1e-20)
        return self._mean.div(1 - first**self._steps).div_(unbiased)


class LearnedLinear:
    """The numbers behind the codes, (out, in), and the scales, (out, groups), of a linear in affine integers."""

    def __init__(self, quantized: Quantized, dtype: torch.dtype) -> None:
        """`dtype` is what the layer computes in."""
        assert isinstance(quantized.scheme, Integer)
        self._given, self._scheme, self._dtype = quantized, quantized.scheme, dtype
        self._numbers = quantized.codes.float()
        self._scale = quantized.params["scale"].clone()
        self._adam = Adam(self._scale)

    @property
    def quantized(self) -> Quantized:
        """What is stored of it as it stands."""
        codes = self._codes().to(self._scheme.code_dtype)
        return replace(self._given, codes=codes, params=self._params)

    def weight(self) -> Tensor:
        """What engines compute with, (out, in), as a leaf that a gradient can be taken by."""
        weight = self._scheme.dequantize(self._codes(), self._params).to(self._dtype)
        return weight.requires_grad_()

    def gradients(self, by_weight: Tensor) -> tuple[Tensor, Tensor]:
        """By codes, (out, in), and by scales, (out, groups), of a loss whose gradient by the weight is given."""
        by_weight = self._scheme.split(by_weight.float())  # (out, groups, width)
        steps = self._scheme.split(self._codes()) - self._params["zero"].unsqueeze(-1)
        by_scale = (by_weight * steps).sum(-1)
        return (by_weight * self._params["scale"].unsqueeze(-1)).flatten(-2), by_scale

    def move(self, by_weight: Tensor, code_step: float, scale_rate: float) -> None:
        """Against the gradient: codes' numbers by `code_step`, scales by about the share `scale_rate` of themselves."""
        by_codes, by_scale = self.gradients(by_weight)
        lowest, highest = self._scheme.lowest - EDGE, self._scheme.highest + EDGE
        self._numbers.sub_(by_codes.sign_(), alpha=code_step).clamp_(lowest, highest)
        self._scale.mul_(1 - scale_rate * self._adam.step(by_scale * self._scale))

    def _codes(self) -> Tensor:
        return self._numbers.round()

    @property
    def _params(self) -> Params:
        found: Mapping[str, Tensor] = self._given.params | {"scale": stored(self._scale)}  # type: ignore[operator]
        return found
