"""Which units of a linear's input columns stay: by optimal brain surgeon, or by a criterion to compare it with.

- `wanda-sp`: Σ |W_ij| ‖x_j‖ over a unit (Sun et al. 2023, arXiv 2306.11695, summed over structures as in FLAP's paper);
- `flap`: the fluctuation Var(x_j) · ‖W_:j‖² over a unit, the mean of what goes made up for by the bias, where there is
  one (An et al. 2023, arXiv 2312.11983);
- `random`: seeded, by layer.

These three leave the weights that stay as they were.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowbit_quantize.structure.moments import Moments, centred
from lowbit_quantize.structure.surgeon import columns_of, least_loss_units, made_up

Criterion = Literal["brain-surgeon", "wanda-sp", "flap", "random"]


@dataclass(frozen=True)
class Chosen:
    """The units that stay, rising, the reader's columns for them, (out, kept), what its bias gains, and the relative
    squared error of its output that is left.
    """

    units: Tensor
    weight: Tensor
    bias: Tensor | None
    error: float


def choose(
    weight: Tensor,
    moments: Moments,
    units: int,
    kept: int,
    criterion: Criterion,
    *,
    biased: bool,
    seed: int = 0,
) -> Chosen:
    """Choose for a reader of weight (out, in), float32, whose inputs have these moments."""
    if kept == units:
        return Chosen(torch.arange(units), weight, None, 0.0)
    hessian, size = moments.hessian, weight.shape[1] // units
    if criterion == "brain-surgeon":
        inputs = centred(hessian, moments.mean) if biased else hessian
        stays = least_loss_units(weight, inputs, units, kept)
        found, bias, error = made_up(weight, moments, columns_of(stays, size), biased=biased)
        return Chosen(stays, found, bias, error)
    scores = _scores(weight, moments, criterion, seed)
    stays = scores.view(units, size).sum(1).topk(kept).indices.sort().values
    columns = columns_of(stays, size)
    found, bias = weight[:, columns], None
    off = weight.clone()
    off[:, columns] = 0.0
    if criterion == "flap" and biased:
        bias = off @ moments.mean
        hessian = centred(hessian, moments.mean)
    power = ((weight @ moments.hessian) * weight).sum().clamp(min=1e-30)
    return Chosen(stays, found, bias, float(((off @ hessian) * off).sum() / power))


def _scores(weight: Tensor, moments: Moments, criterion: Criterion, seed: int) -> Tensor:
    """Of each input column, (in,)."""
    power = moments.hessian.diagonal()
    if criterion == "wanda-sp":
        return weight.abs().sum(0) * power.sqrt()
    if criterion == "flap":
        return (power - moments.mean.square()).clamp(min=0) * weight.square().sum(0)
    return torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(seed)).to(weight.device)
