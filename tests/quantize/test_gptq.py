"""GPTQ, against the textbook loop and bounds."""

import pytest
import torch

from lowbit_core.errors import NumericsError
from lowbit_quantize.clip import round_clipped, search_grids
from lowbit_quantize.gptq import DAMPING, gptq_codes, inverse_factor, remaining_variance, round_gptq
from lowbit_quantize.grid import GridSpec, Rounded, group_grid, output_error

SPECS = [GridSpec(bits, 32, symmetric) for bits in (4, 8) for symmetric in (True, False)]


def problem(features: int = 160, rows: int = 70) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(20)
    mix = torch.randn(features, features, generator=generator) / features**0.5 + torch.eye(features)
    inputs = torch.randn(1500, features, generator=generator) @ mix + 0.3
    return torch.randn(rows, features, generator=generator), inputs.T @ inputs / len(inputs)


def textbook(
    columns: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, inverse: torch.Tensor, spec: GridSpec
) -> torch.Tensor:
    """One column at a time, the inverse of what is left recomputed by elimination (Frantar et al., eq. 2 and 3)."""
    columns, inverse = columns.double().clone(), inverse.double().clone()
    codes = []
    for j in range(len(columns)):
        code = (torch.round(columns[j] / scale[j]) + zero[j]).clamp(spec.lowest, spec.highest)
        codes.append(code)
        error = (columns[j] - (code - zero[j]) * scale[j]) / inverse[j, j]
        columns -= torch.outer(inverse[:, j], error)
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0  # done with; never used again
    return torch.stack(codes)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_blocked_codes_equal_the_textbook_loops(spec: GridSpec, dtype: torch.dtype) -> None:
    weight, covariance = (part.to(dtype) for part in problem())
    factor = inverse_factor(covariance)
    groups = torch.arange(160) // 32
    scale, zero = (part.to(dtype).T[groups] for part in group_grid(weight.unflatten(1, (-1, 32)), spec))
    codes = gptq_codes(weight.T, scale, zero, factor, spec)
    expected = textbook(weight.T, scale, zero, factor.T.double() @ factor.double(), spec)
    off = (codes - expected).abs()
    # In float32 a weight half-way between two codes may take the other, and the rest of its row makes up for it.
    assert off.any(dim=0).sum() <= (dtype == torch.float32)
    assert off.max() <= 1


def test_remaining_variance_is_what_later_columns_cannot_make_up_for() -> None:
    covariance = problem()[1].double()
    damped = covariance + DAMPING[0] * covariance.diagonal().mean() * torch.eye(160)
    order = covariance.diagonal().argsort(descending=True)
    remaining = remaining_variance(covariance)
    for place, column in enumerate(order.tolist()):
        later = order[place:]
        expected = 1 / torch.linalg.inv(damped[later][:, later])[0, 0]
        torch.testing.assert_close(remaining[column], expected)


@pytest.mark.parametrize("spec", SPECS[:2], ids=str)
def test_grids_chosen_by_remaining_variance_serve_gptq_better(spec: GridSpec) -> None:
    generator = torch.Generator().manual_seed(21)
    common, own = torch.randn(40, 160, generator=generator), torch.rand(160, generator=generator)
    covariance = (
        common.T @ common / 40 + own.square().diag()
    )  # inputs that share a lot, each to another degree
    weight = problem()[0]
    order = covariance.diagonal().argsort(descending=True)
    factor, groups = inverse_factor(covariance[order][:, order]), order // 32

    def error(curvature: torch.Tensor) -> float:
        scale, zero = search_grids(weight, curvature, spec)
        codes = torch.empty(160, 70, dtype=torch.int8)
        codes[order] = gptq_codes(weight.T[order], scale.T[groups], zero.T[groups], factor, spec)
        return float(output_error(weight - Rounded(codes.T, scale, zero, spec).dequantize(), covariance))

    assert error(remaining_variance(covariance)) < 0.95 * error(covariance)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gptq_errs_less_than_rounding_each_weight_by_itself(spec: GridSpec) -> None:
    weight, covariance = problem()
    ours, nearest = round_gptq(weight, covariance, spec), round_clipped(weight, covariance, spec)

    def error(served: torch.Tensor) -> float:
        return float(output_error(weight - served, covariance))

    assert error(ours.dequantize()) < 0.8 * error(nearest.dequantize())


def test_a_covariance_that_is_singular_is_damped_until_it_factors() -> None:
    weight, covariance = problem()
    covariance[:40], covariance[:, :40] = 0, 0  # dead inputs
    rounded = round_gptq(weight, covariance, SPECS[0])
    assert torch.isfinite(rounded.dequantize()).all()
    flat = torch.ones(64, 64)  # rank 1
    factor = inverse_factor(flat)
    damped = flat + 0.01 * torch.eye(64)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(64), atol=1e-2, rtol=0)


def test_a_covariance_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NumericsError, match="cannot be factored"):
        inverse_factor(torch.full((8, 8), torch.nan))
