"""The grid search, against obvious slow versions and bounds."""

import pytest
import torch

from lowbit_quantize.clip import (
    Best,
    block_error,
    diagonal_blocks,
    least_squares_scale,
    round_clipped,
    search_grids,
    solve_scales,
    split_groups,
)
from lowbit_quantize.grid import GridSpec, encode, group_grid, output_error, range_grid, round_to_grid

SPEC = GridSpec(4, 32, symmetric=True)
ASYMMETRIC = GridSpec(4, 32, symmetric=False)


def correlated_inputs(features: int = 128, tokens: int = 2000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(features, features, generator=generator) / features**0.5 + torch.eye(features)
    inputs: torch.Tensor = torch.randn(tokens, features, generator=generator) @ mix + 0.5
    return inputs


def weight_and_covariance() -> tuple[torch.Tensor, torch.Tensor]:
    inputs = correlated_inputs()
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(4))
    return weight, inputs.T @ inputs / len(inputs)


def test_block_error_equals_the_error_on_each_groups_own_inputs() -> None:
    inputs = correlated_inputs()
    difference = torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(5))
    blocks = diagonal_blocks(inputs.T @ inputs / len(inputs), 32)
    for group in range(4):
        outputs = inputs[:, group * 32 : (group + 1) * 32] @ difference[group].T  # (tokens, rows)
        torch.testing.assert_close(
            block_error(difference, blocks)[group], outputs.square().mean(0), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("spec", [SPEC, ASYMMETRIC], ids=str)
def test_a_diagonal_chooses_the_grids_that_its_matrix_would(spec: GridSpec) -> None:
    weight, covariance = weight_and_covariance()
    diagonal = covariance.diagonal().clone()
    of_matrix, of_diagonal = (search_grids(weight, c, spec) for c in (diagonal.diag(), diagonal))
    for one, other in zip(of_matrix, of_diagonal, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=0)


@pytest.mark.parametrize("spec", [SPEC, ASYMMETRIC], ids=str)
def test_clipped_grids_err_less_than_the_range(spec: GridSpec) -> None:
    weight, covariance = weight_and_covariance()
    plain = round_to_grid(weight, *range_grid(weight, spec), spec)
    clipped = round_clipped(weight, covariance, spec)
    assert output_error(weight - clipped.dequantize(), covariance) < 0.9 * output_error(
        weight - plain.dequantize(), covariance
    )


def test_least_squares_scale_is_the_minimum_over_scales_for_fixed_codes() -> None:
    weight, covariance = weight_and_covariance()
    groups, blocks = split_groups(weight, SPEC), diagonal_blocks(covariance, 32)
    scale, zero = group_grid(groups, SPEC)
    codes = encode(groups, scale, zero, SPEC)
    best = least_squares_scale(groups, Best(torch.zeros_like(scale), scale, zero), blocks, SPEC)

    def error(candidate: torch.Tensor) -> torch.Tensor:
        return block_error(groups - codes * candidate.unsqueeze(-1), blocks)

    for factor in (0.97, 0.99, 1.01, 1.03):
        assert (error(best) <= error(best * factor) + 1e-5).all()


@pytest.mark.parametrize("spec", [SPEC, ASYMMETRIC], ids=str)
def test_solving_all_scales_together_never_errs_more_in_any_row(spec: GridSpec) -> None:
    weight, covariance = weight_and_covariance()
    before = round_to_grid(weight, *range_grid(weight, spec), spec)
    after = solve_scales(before, weight, covariance)

    def row_errors(served: torch.Tensor) -> torch.Tensor:
        return (((weight - served) @ covariance) * (weight - served)).sum(1)

    assert (row_errors(after.dequantize()) <= row_errors(before.dequantize()) * 1.0001).all()
    assert row_errors(after.dequantize()).sum() < 0.95 * row_errors(before.dequantize()).sum()
    assert torch.equal(after.codes, before.codes)


def test_groups_of_zeros_and_dead_inputs_stay_finite_and_exact() -> None:
    weight, covariance = weight_and_covariance()
    weight[:, :32] = 0
    covariance[32:64], covariance[:, 32:64] = 0, 0
    rounded = round_clipped(weight, covariance, SPEC)
    assert torch.isfinite(rounded.scale).all()
    assert (rounded.dequantize()[:, :32] == 0).all()
