"""GPTQ, against the textbook loop and bounds."""

from dataclasses import dataclass

import pytest
import torch

from lowbit_core.errors import NumericsError
from lowbit_quantize.methods.awq import Awq
from lowbit_quantize.methods.gptq import DAMPING, Gptq, gptq_codes, inverse_factor
from lowbit_quantize.schemes.integer import Integer
from lowbit_quantize.schemes.scheme import Params
from lowbit_quantize.statistics.hessian import output_error

SCHEMES = [Integer(bits, 32, symmetric, "a test's") for bits in (4, 8) for symmetric in (True, False)]


def problem(features: int = 160, rows: int = 70) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(20)
    mix = torch.randn(features, features, generator=generator) / features**0.5 + torch.eye(features)
    inputs = torch.randn(1500, features, generator=generator) @ mix + 0.3
    return torch.randn(rows, features, generator=generator), inputs.T @ inputs / len(inputs)


def textbook(
    columns: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, inverse: torch.Tensor, scheme: Integer
) -> torch.Tensor:
    """One column at a time, the inverse of what is left recomputed by elimination (Frantar et al., eq. 2 and 3)."""
    columns, inverse = columns.double().clone(), inverse.double().clone()
    codes = []
    for j in range(len(columns)):
        code = (torch.round(columns[j] / scale[j]) + zero[j]).clamp(scheme.lowest, scheme.highest)
        codes.append(code)
        error = (columns[j] - (code - zero[j]) * scale[j]) / inverse[j, j]
        columns -= torch.outer(inverse[:, j], error)
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0  # done with; never used again
    return torch.stack(codes)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_blocked_codes_equal_the_textbook_loops(scheme: Integer, dtype: torch.dtype) -> None:
    weight, hessian = (part.to(dtype) for part in problem())
    factor = inverse_factor(hessian)
    groups = torch.arange(160) // 32
    params = {name: value.to(dtype) for name, value in scheme.search(weight, None).items()}
    codes = gptq_codes(weight.T, scheme.columns(params, groups), factor, scheme.code_dtype)
    scale, zero = (params[name].T[groups] for name in ("scale", "zero"))
    expected = textbook(weight.T, scale, zero, factor.T.double() @ factor.double(), scheme)
    off = (codes - expected).abs()
    # In float32 a weight half-way between two codes may take the other, and the rest of its row makes up for it.
    assert off.any(dim=0).sum() <= (dtype == torch.float32)
    assert off.max() <= 1


def test_the_cost_is_what_later_columns_cannot_make_up_for() -> None:
    hessian = problem()[1].double()
    damped = hessian + DAMPING[0] * hessian.diagonal().mean() * torch.eye(160)
    order = hessian.diagonal().argsort(descending=True)
    cost = Gptq().cost(hessian)
    for place, column in enumerate(order.tolist()):
        later = order[place:]
        expected = 1 / torch.linalg.inv(damped[later][:, later])[0, 0]
        torch.testing.assert_close(cost[column], expected)


@dataclass(frozen=True)
class SearchedBy(Integer):
    """A scheme whose parameters are searched with another cost than the one it is given."""

    other: torch.Tensor | None = None

    def search(self, weight: torch.Tensor, hessian: torch.Tensor | None) -> Params:
        return super().search(weight, hessian if self.other is None else self.other)

    def refine(
        self, codes: torch.Tensor, params: Params, weight: torch.Tensor, hessian: torch.Tensor
    ) -> Params:
        return params


@pytest.mark.parametrize("symmetric", [True, False])
def test_parameters_chosen_by_gptqs_cost_serve_it_better(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(21)
    common, own = torch.randn(40, 160, generator=generator), torch.rand(160, generator=generator)
    # Inputs that share a lot, each to another degree.
    hessian = common.T @ common / 40 + own.square().diag()
    weight = problem()[0]

    def error(other: torch.Tensor | None) -> float:
        scheme = SearchedBy(4, 32, symmetric, "a test's", other)
        return float(output_error(weight - Gptq().quantize(weight, hessian, scheme).dequantize(), hessian))

    assert error(None) < 0.95 * error(hessian)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gptq_errs_less_than_quantizing_each_weight_by_itself(scheme: Integer) -> None:
    weight, hessian = problem()

    def error(method: Awq | Gptq) -> float:
        return float(output_error(weight - method.quantize(weight, hessian, scheme).dequantize(), hessian))

    assert error(Gptq()) < 0.8 * error(Awq())


def test_a_hessian_that_is_singular_is_damped_until_it_factors() -> None:
    weight, hessian = problem()
    hessian[:40], hessian[:, :40] = 0, 0  # dead inputs
    assert torch.isfinite(Gptq().quantize(weight, hessian, SCHEMES[0]).dequantize()).all()
    flat = torch.ones(64, 64)  # rank 1
    factor = inverse_factor(flat)
    damped = flat + 0.01 * torch.eye(64)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(64), atol=1e-2, rtol=0)


def test_a_hessian_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NumericsError, match="cannot be factored"):
        inverse_factor(torch.full((8, 8), torch.nan))
