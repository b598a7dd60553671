"""The search of scales and zero points, against obvious slow versions and bounds."""

import pytest
import torch

from lowbit_quantize.methods.awq import Awq
from lowbit_quantize.schemes.integer import TRIAL_CLIPS, Integer
from lowbit_quantize.schemes.numbers.affine import encode, range_params
from lowbit_quantize.schemes.scheme import diagonal_blocks
from lowbit_quantize.schemes.search.affine_search import (
    Best,
    best_of,
    block_error,
    candidates,
    least_squares_scale,
    search_params,
    solve_scales,
    split_groups,
)
from lowbit_quantize.statistics.hessian import output_error

SYMMETRIC = Integer(4, 32, symmetric=True, name="W4A16")
BOTH = [SYMMETRIC, Integer(4, 32, symmetric=False, name="W4A16_ASYM")]


def correlated_inputs(features: int = 128, tokens: int = 2000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(features, features, generator=generator) / features**0.5 + torch.eye(features)
    inputs: torch.Tensor = torch.randn(tokens, features, generator=generator) @ mix + 0.5
    return inputs


def weight_and_hessian() -> tuple[torch.Tensor, torch.Tensor]:
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


@pytest.mark.parametrize("scheme", BOTH, ids=str)
def test_a_diagonal_chooses_the_parameters_that_its_matrix_would(scheme: Integer) -> None:
    weight, hessian = weight_and_hessian()
    diagonal = hessian.diagonal().clone()
    of_matrix, of_diagonal = (search_params(weight, cost, scheme) for cost in (diagonal.diag(), diagonal))
    for one, other in zip(of_matrix, of_diagonal, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=0)


@pytest.mark.parametrize("scheme", BOTH, ids=str)
def test_searched_parameters_err_less_than_the_range(scheme: Integer) -> None:
    weight, hessian = weight_and_hessian()
    params = scheme.search(weight, None)
    plain = scheme.dequantize(scheme.quantize(weight, params), params)
    searched = Awq().quantize(weight, hessian, scheme).dequantize()
    assert output_error(weight - searched, hessian) < 0.9 * output_error(weight - plain, hessian)


def test_least_squares_scale_is_the_minimum_over_scales_for_fixed_codes() -> None:
    weight, hessian = weight_and_hessian()
    groups, blocks = split_groups(weight, SYMMETRIC), diagonal_blocks(hessian, 32)
    scale, zero = range_params(groups, SYMMETRIC)
    codes = encode(groups, scale, zero, SYMMETRIC)
    best = least_squares_scale(groups, Best(torch.zeros_like(scale), scale, zero), blocks, SYMMETRIC)

    def error(candidate: torch.Tensor) -> torch.Tensor:
        return block_error(groups - codes * candidate.unsqueeze(-1), blocks)

    for factor in (0.97, 0.99, 1.01, 1.03):
        assert (error(best) <= error(best * factor) + 1e-5).all()


@pytest.mark.parametrize("scheme", BOTH, ids=str)
def test_solving_all_scales_together_never_errs_more_in_any_row(scheme: Integer) -> None:
    weight, hessian = weight_and_hessian()
    params = scheme.search(weight, None)
    codes = scheme.quantize(weight, params)
    solved = solve_scales(codes, params["scale"], params["zero"], weight, hessian, scheme)

    def row_errors(scale: torch.Tensor) -> torch.Tensor:
        served = scheme.dequantize(codes, {**params, "scale": scale})
        return (((weight - served) @ hessian) * (weight - served)).sum(1)

    assert (row_errors(solved) <= row_errors(params["scale"]) * 1.0001).all()
    assert row_errors(solved).sum() < 0.95 * row_errors(params["scale"]).sum()
    refined = scheme.refine(codes, params, weight, hessian)
    assert torch.equal(refined["scale"], solved)
    assert torch.equal(refined["zero"], params["zero"])


@pytest.mark.parametrize("scheme", BOTH, ids=str)
@pytest.mark.parametrize("diagonal", [False, True])
def test_a_trial_errs_as_the_best_of_a_few_clips_does(scheme: Integer, diagonal: bool) -> None:
    """What a scale of the inputs is judged by, against one group of one row at a time."""
    weight, hessian = weight_and_hessian()
    weight = weight[:4]
    blocks = diagonal_blocks(hessian.diagonal().clone() if diagonal else hessian, 32)
    total = 0.0
    for row in weight:
        for group, block in zip(row.view(4, 1, 1, 32), blocks, strict=True):
            tried = candidates(group, scheme, TRIAL_CLIPS)
            total += float(best_of(group, block.unsqueeze(0), tried).error)
    assert scheme.trial_error(weight, blocks) == pytest.approx(total, rel=1e-4)


def test_groups_of_zeros_and_dead_inputs_stay_finite_and_exact() -> None:
    weight, hessian = weight_and_hessian()
    weight[:, :32] = 0
    hessian[32:64], hessian[:, 32:64] = 0, 0
    quantized = Awq().quantize(weight, hessian, SYMMETRIC)
    assert torch.isfinite(quantized.params["scale"]).all()
    assert (quantized.dequantize()[:, :32] == 0).all()
