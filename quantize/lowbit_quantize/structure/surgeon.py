"""Optimal brain surgeon on columns: which inputs of a linear may go, and what the rest becomes for it.

Taking the columns S out of W (out, in) and letting the others make up for it costs at least tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ) on
inputs of the Hessian H, and W − W_S (H⁻¹_SS)⁻¹ H⁻¹_S: is what reaches that (Hassibi and Stork 1993; of columns: ZipLM,
Kurtić et al. 2023, arXiv 2302.04089, and SlimGPT, Ling et al. 2024, arXiv 2412.18110). Units of columns go a few at a
time, the cheapest first, each time on what the rest has become.

The rest is then solved for at once, from the original weight: Ŵ_K = W_K + W_S H_SK (H_KK + r diag H_KK)⁻¹, which is
the least ‖(W − Ŵ) X‖² + r Σ H_jj ‖Ŵ_j − W_j‖²: a ridge toward the original. Plain least squares fit the calibration
text (arXiv 2510.07782); so r is the one under which each half of the tokens is best served by what the other half says.
"""

import torch
from torch import Tensor

from lowbit_quantize.structure.moments import Moments, centred

STEPS = 128  # in which units go
RIDGE = 0.01  # of each channel's own power, while units are chosen
RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
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


def made_up(
    weight: Tensor, moments: Moments, kept: Tensor, *, biased: bool
) -> tuple[Tensor, Tensor | None, float]:
    """What the `kept` columns become, (out, kept), what a bias gains, (out,), and the relative error that is left.

    Where the linear is `biased`, the mean of what goes is the bias's. The error is that of each half of the tokens by
    what the other half says, relative to the output's power.
    """
    halves = [moments.half(number) for number in (0, 1)]
    errors = {
        ridge: sum(
            _error(weight, _solved(weight, said, kept, ridge, biased=biased), judge, kept, biased=biased)
            for said, judge in (halves, halves[::-1])
        )
        for ridge in RIDGES
    }
    best = min(errors, key=lambda ridge: errors[ridge])
    power = sum(float(((weight @ hessian) * weight).sum()) for hessian, _ in halves)
    found, bias = _solved(weight, (moments.hessian, moments.mean), kept, best, biased=biased)
    return found, bias, errors[best] / max(power, 1e-30)


def _solved(
    weight: Tensor, said: tuple[Tensor, Tensor], kept: Tensor, ridge: float, *, biased: bool
) -> tuple[Tensor, Tensor | None]:
    hessian, mean = said
    inputs = centred(hessian, mean) if biased else hessian
    gone = _others(kept, len(hessian))
    lower = _factor(inputs[kept.unsqueeze(1), kept], ridge)
    wanted = inputs[kept.unsqueeze(1), gone] @ weight[:, gone].T  # (kept, out)
    found = weight[:, kept] + torch.cholesky_solve(wanted, lower).T
    return found, (weight @ mean - found @ mean[kept]) if biased else None


def _error(
    weight: Tensor,
    found: tuple[Tensor, Tensor | None],
    judge: tuple[Tensor, Tensor],
    kept: Tensor,
    *,
    biased: bool,
) -> float:
    """Mean ‖(W − Ŵ) x − b‖² on inputs of this Hessian and mean."""
    (hessian, mean), (new, bias) = judge, found
    off = weight.clone()
    off[:, kept] -= new
    error = ((off @ hessian) * off).sum()
    if biased and bias is not None:
        error = error - 2 * (bias * (off @ mean)).sum() + bias.square().sum()
    return float(error)


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
