"""GPTQ, against the textbook loop and bounds."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit_core.errors import NumericsError
from lowbit_quantize.methods import gptq
from lowbit_quantize.methods.awq import Awq
from lowbit_quantize.methods.gptq import DAMPING, Gptq, gptq_codes, ordered_factor
from lowbit_quantize.methods.method import Method
from lowbit_quantize.methods.rtn import RoundToNearest
from lowbit_quantize.schemes import eight_bits
from lowbit_quantize.schemes.integer import Integer
from lowbit_quantize.schemes.scheme import Params, Scheme
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
    (order,), factor = ordered_factor(hessian.unsqueeze(0))
    groups = order // 32
    params = {name: value.to(dtype) for name, value in scheme.search(weight, None).items()}
    stacked = {name: value.unsqueeze(0) for name, value in params.items()}
    codes = gptq_codes(
        weight.T[order].unsqueeze(0),
        scheme.columns(stacked, groups.unsqueeze(0)),
        factor / factor.diagonal(dim1=1, dim2=2).unsqueeze(1),
        scheme.code_dtype,
    )
    first = order.flip(0)  # the order in which they are quantized
    scale, zero = (params[name].T[groups.flip(0)] for name in ("scale", "zero"))
    inverse = torch.linalg.inv((factor[0].double() @ factor[0].double().T).flip(0, 1))
    expected = textbook(weight.T[first], scale, zero, inverse, scheme)
    off = (codes[0].flip(0) - expected).abs()
    # In float32 a weight half-way between two codes may take the other, and the rest of its row makes up for it.
    assert off.any(dim=0).sum() <= (dtype == torch.float32)
    assert off.max() <= 1


def shrunk(hessian: torch.Tensor) -> torch.Tensor:
    return (1 - gptq.SHRINKAGE) * hessian + gptq.SHRINKAGE * hessian.diagonal().diag()


def test_the_cost_is_what_later_columns_cannot_make_up_for() -> None:
    hessian = problem()[1].double()
    damped = shrunk(hessian) + DAMPING[0] * hessian.diagonal().mean() * torch.eye(160)
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
        return super().search(weight, hessian if self.other is None else self.other.unsqueeze(0))

    def refine(
        self, codes: torch.Tensor, params: Params, weight: torch.Tensor, hessian: torch.Tensor
    ) -> Params:
        return params


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("shrinkage", "bound"), [(0.0, 0.95), (gptq.SHRINKAGE, 0.98)])
def test_parameters_chosen_by_gptqs_cost_serve_it_better(
    symmetric: bool, shrinkage: float, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where inputs share this much, a shrunk Hessian leaves less to gain on what it was shrunk from."""
    monkeypatch.setattr(gptq, "SHRINKAGE", shrinkage)
    generator = torch.Generator().manual_seed(21)
    common, own = torch.randn(40, 160, generator=generator), torch.rand(160, generator=generator)
    # Inputs that share a lot, each to another degree.
    hessian = common.T @ common / 40 + own.square().diag()
    weight = problem()[0]

    def error(other: torch.Tensor | None) -> float:
        scheme = SearchedBy(4, 32, symmetric, "a test's", other)
        return float(output_error(weight - Gptq().quantize(weight, hessian, scheme).dequantize(), hessian))

    assert error(None) < bound * error(hessian)


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
    factor = ordered_factor(flat.unsqueeze(0))[1][0]
    torch.testing.assert_close(factor @ factor.T, shrunk(flat) + 0.01 * torch.eye(64), atol=1e-5, rtol=0)


def test_a_hessian_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NumericsError, match="cannot be factored"):
        ordered_factor(torch.full((1, 8, 8), torch.nan))


EIGHT_BITS = [preset.make("channel") for preset in eight_bits.PRESETS]


def several(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of one shape and their Hessians."""
    weight, hessian = problem()
    scales = [torch.linspace(1, number + 2, 160) for number in range(count)]
    hessians = torch.stack([hessian * torch.outer(scale, scale) for scale in scales])
    weights = torch.stack([weight.roll(number, 1) / (number + 1) for number in range(count)])
    return weights, hessians


@pytest.mark.parametrize("method", [Gptq(), Awq(), RoundToNearest()], ids=lambda one: one.name)
@pytest.mark.parametrize("scheme", [*SCHEMES, Integer(4, None, True, "a test's"), *EIGHT_BITS], ids=str)
def test_several_weights_become_at_once_what_each_becomes_by_itself(scheme: Scheme, method: Method) -> None:
    weights, hessians = several()
    together = method.quantize(weights, hessians, scheme).split()
    for found, weight, hessian in zip(together, weights, hessians, strict=True):
        alone = method.quantize(weight, hessian, scheme)
        # A weight half-way between two codes may take the other, and the rest of its row makes up for it.
        same = (found.codes == alone.codes).all(1)
        assert same.float().mean() > 0.95
        torch.testing.assert_close(found.dequantize()[same], alone.dequantize()[same], rtol=1e-2, atol=0)
        errors = [float(output_error(weight - one.dequantize(), hessian)) for one in (found, alone)]
        assert errors[0] == pytest.approx(errors[1], rel=5e-3)


class Launches(TorchDispatchMode):
    """Counts what would be a kernel each on a GPU."""

    VIEWS = (
        *("view", "slice", "select", "transpose", "t.", "expand", "unsqueeze", "squeeze", "unbind", "split"),
        *("diagonal.", "alias", "detach", "permute", "as_strided", "empty", "unflatten"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        self.count += not name.startswith(self.VIEWS)
        return func(*args, **(kwargs or {}))


def test_several_weights_take_about_as_many_launches_as_one() -> None:
    """45,100 an expert of 768 x 2,048 were counted where each was quantized by itself, by a loop of six a column."""
    scheme, columns = SCHEMES[0], 160

    def launches(count: int) -> int:
        weights, hessians = several(count)
        counted = Launches()
        with counted:
            Gptq().quantize(weights, hessians, scheme)
        return counted.count

    one, eight = launches(1), launches(8)
    assert one < 5 * columns + 450  # the loop's five a column; the rest does not grow with columns
    assert eight < one + 7 * 20  # what is done for each by itself: putting columns in order and back
