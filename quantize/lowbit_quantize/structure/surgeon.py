"""Optimal brain surgeon on columns: which inputs of a linear may go, and what the rest becomes for it.

Taking the columns S out of W (out, in) and letting the others make up for it costs at least tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ) on
inputs of the Hessian H, and W − W_S (H⁻¹_SS)⁻¹ H⁻¹_S: is what reaches that (Hassibi and Stork 1993; of columns: ZipLM,
Kurtić et al. 2023, arXiv 2302.04089, and SlimGPT, Ling et al. 2024, arXiv 2412.18110). Units of columns go a few at a
time, the cheapest first, each time on what the rest has become.

The rest is then solved for at once, from the original weight: Ŵ_K = W_K + W_S H_SK (H_KK + r diag H_KK)⁻¹, which is
the least ‖(W − Ŵ) X‖² + r Σ H_jj ‖Ŵ_j − W_j‖²: a ridge toward the original. Plain least squares fit the calibration
text (arXiv 2510.07782); so r is the one under which each half of the tokens is best served by what the other half says.
Where it is known how far outputs are off the base model's by the layers before, that is made up for too, as far (`aim`)
as the halves say so of each other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_quantize.structure.moments import Aim, Moments, Off, centred

STEPS = 128  # in which units go
RIDGE = 0.01  # of each channel's own power, while units are chosen
RIDGES = (0.001, 0.01, 0.03, 0.1, 0.3)
TINY = 1e-30
LEAST = 1e-12  # of a channel's power, relative to the mean


def least_loss_units(weight: Tensor, hessian: Tensor, units: int, kept: int, steps: int = STEPS) -> Tensor:
    """The numbers, rising, of the `kept` of so many equal units of columns without which the output errs most.

    `weight` is (out, in), `hessian` (in, in), both float32.
    """
    weight, size, going = weight.clone(), weight.shape[1] // units, units - kept
    inverse = torch.cholesky_inverse(_factor(hessian, RIDGE))
    stays = torch.ones(units, dtype=torch.bool, device=weight.device)
    for number in range(min(steps, going)):
        now = going * (number + 1) // min(steps, going) - going * number // min(steps, going)
        losses = _losses(weight, inverse, units).masked_fill(~stays, torch.inf)
        gone = losses.topk(now, largest=False).indices.sort().values
        stays[gone] = False
        columns = columns_of(gone, size)
        solved = torch.linalg.solve(inverse[columns.unsqueeze(1), columns], inverse[columns])  # (gone, in)
        weight -= weight[:, columns] @ solved
        inverse -= inverse[:, columns] @ solved
        weight[:, columns] = 0.0
        # What is gone has no uncertainty left; a one keeps its block invertible.
        inverse[columns], inverse[:, columns] = 0.0, 0.0
        inverse[columns, columns] = 1.0
    return stays.nonzero().flatten()


def _losses(weight: Tensor, inverse: Tensor, units: int) -> Tensor:
    """tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ) of each unit alone, (units,)."""
    size = weight.shape[1] // units
    if size == 1:
        return weight.square().sum(0) / inverse.diagonal().clamp(min=TINY)
    blocks = torch.stack([inverse[at : at + size, at : at + size] for at in range(0, len(inverse), size)])
    parts = weight.view(len(weight), units, size).permute(1, 2, 0)  # (units, size, out)
    losses: Tensor = (parts * torch.linalg.solve(blocks, parts)).sum((1, 2))
    return losses


def columns_of(units: Tensor, size: int) -> Tensor:
    """The columns of units of so many, one after the other."""
    return (units.unsqueeze(1) * size + torch.arange(size, device=units.device)).flatten()


@dataclass(frozen=True)
class Said:
    """What some tokens say: the Hessian and the mean of inputs, and how far outputs are off, with the mean taken out of
    all of it where the linear is `biased`.
    """

    hessian: Tensor
    mean: Tensor
    off: Off
    biased: bool

    @property
    def inputs(self) -> Tensor:
        """The Hessian of what no bias makes up for, (in, in)."""
        return centred(self.hessian, self.mean) if self.biased else self.hessian

    @property
    def cross(self) -> Tensor:
        """Mean off xᵀ of what no bias makes up for, (out, in)."""
        return self.off.cross - torch.outer(self.off.mean, self.mean) if self.biased else self.off.cross


@dataclass(frozen=True)
class Parts:
    """What the `kept` columns become, (out, kept): `plain`, and as many times `aimed` as the base model is aimed at."""

    plain: Tensor
    aimed: Tensor

    def at(self, aim: float) -> Tensor:
        return self.plain + aim * self.aimed


def made_up(
    weight: Tensor, moments: Moments, kept: Tensor, *, biased: bool
) -> tuple[Tensor, Tensor | None, float]:
    """What the `kept` columns become, (out, kept), what a bias gains, (out,), and the relative error that is left.

    Where the linear is `biased`, the mean of what goes is the bias's. The error is that of each half of the tokens by
    what the other half says, relative to the output's power.
    """
    halves = [_said(weight, moments, number, biased=biased) for number in (0, 1)]
    best: tuple[float, float, float] | None = None
    for ridge in RIDGES:
        judged = [
            _error(weight, _solved(weight, said, kept, ridge), said, judge, kept)
            for said, judge in (halves, halves[::-1])
        ]
        square, linear, rest = (sum(terms) for terms in zip(*judged, strict=True))
        aim = min(1.0, max(0.0, -linear / (2 * square))) if square > 0 else 0.0
        error = square * aim * aim + linear * aim + rest
        if best is None or error < best[0]:
            best = error, ridge, aim
    assert best is not None, "there are ridges to choose from"
    error, ridge, aim = best
    power = sum(float(((weight @ half.hessian) * weight).sum()) for half in halves)
    every = _said(weight, moments, None, biased=biased)
    found = _solved(weight, every, kept, ridge).at(aim)
    gain = weight @ every.mean + aim * every.off.mean - found @ every.mean[kept] if biased else None
    return found, gain, error / max(power, 1e-30)


def _said(weight: Tensor, moments: Moments, half: int | None, *, biased: bool) -> Said:
    hessian, mean = (moments.hessian, moments.mean) if half is None else moments.half(half)
    if isinstance(moments, Aim):
        return Said(hessian, mean, moments.off(half), biased)
    return Said(hessian, mean, Off(torch.zeros_like(weight), weight.new_zeros(len(weight)), 0.0), biased)


def _solved(weight: Tensor, said: Said, kept: Tensor, ridge: float) -> Parts:
    inputs = said.inputs
    gone = _others(kept, len(inputs))
    lower = _factor(inputs[kept.unsqueeze(1), kept], ridge)
    wanted = inputs[kept.unsqueeze(1), gone] @ weight[:, gone].T  # (kept, out)
    plain = weight[:, kept] + torch.cholesky_solve(wanted, lower).T
    return Parts(plain, torch.cholesky_solve(said.cross[:, kept].T.contiguous(), lower).T)


def _error(weight: Tensor, found: Parts, said: Said, judge: Said, kept: Tensor) -> tuple[float, float, float]:
    """The squared error of outputs on what `judge` says, as a polynomial in the aim: a² and a¹ and the rest.

    A bias, where there is one, is that which `said` says.
    """
    plain = weight.clone()
    plain[:, kept] -= found.plain
    aimed = torch.zeros_like(weight)
    aimed[:, kept] = found.aimed  # what is left is plain − aim · aimed
    by_plain, by_aimed = plain @ judge.hessian, aimed @ judge.hessian
    square, linear = float((by_aimed * aimed).sum()), -2 * float((by_plain * aimed).sum())
    rest = float((by_plain * plain).sum()) + judge.off.power
    linear -= 2 * float((judge.off.cross * aimed).sum())
    rest += 2 * float((judge.off.cross * plain).sum())
    if said.biased:  # b = plain μ + aim (off − aimed μ), by what was said
        first, second = plain @ said.mean, said.off.mean - aimed @ said.mean
        off, by = judge.off.mean + plain @ judge.mean, aimed @ judge.mean
        rest += float(first.square().sum() - 2 * (first * off).sum())
        linear += float(2 * (first * second).sum() - 2 * (second * off).sum() + 2 * (first * by).sum())
        square += float(second.square().sum() + 2 * (second * by).sum())
    return square, linear, rest


def _others(kept: Tensor, count: int) -> Tensor:
    stays = torch.zeros(count, dtype=torch.bool, device=kept.device)
    stays[kept] = True
    return (~stays).nonzero().flatten()


def _factor(hessian: Tensor, ridge: float) -> Tensor:
    """Lower L of L Lᵀ = H + r diag H; channels that are never seen count as almost nothing."""
    ridged = hessian.clone()
    power = hessian.diagonal()
    ridged.diagonal().add_(ridge * power + LEAST * power.mean().clamp(min=LEAST))
    factor: Tensor = torch.linalg.cholesky(ridged)
    return factor
