"""W8A8 and FP8: weights and inputs on one grid."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowbit_quantize.device.precision import int8_product
from lowbit_quantize.methods.gptq import Gptq
from lowbit_quantize.schemes.eight_bits import PRESETS, EightBits
from lowbit_quantize.schemes.inputs import SMALLEST_FP8_SCALE, InputQuantizer
from lowbit_quantize.schemes.numbers.grids import FP8, INT8, Grid
from lowbit_quantize.schemes.rounding_linear import RoundingLinear

SCHEMES = {preset.name: preset.make("channel") for preset in PRESETS}


def weight_of(seed: int, outputs: int = 48, inputs: int = 96) -> Tensor:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    weight[3] *= 30
    weight[5] = 0
    return weight


def hessian_of(seed: int, inputs: int = 96) -> Tensor:
    """Of inputs of very different sizes that hang together."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(512, 16, generator=generator) @ torch.randn(16, inputs, generator=generator)
    rows += 0.5 * torch.randn(512, inputs, generator=generator)
    rows *= torch.logspace(-1, 1, inputs)
    return rows.T @ rows / len(rows)


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> EightBits:
    found = SCHEMES[request.param]
    assert isinstance(found, EightBits)
    return found


def test_what_is_read_back_is_what_was_stored_and_takes_the_bytes_forecast(scheme: EightBits) -> None:
    weight = weight_of(0)
    params = scheme.search(weight, hessian_of(1))
    codes = scheme.quantize(weight, params)
    tensors = scheme.tensors(codes, params)
    if scheme.input_quantizer.static:
        tensors["input_scale"] = torch.tensor([0.5])
    found = scheme.read(tensors)
    assert torch.equal(found.dequantize(), scheme.dequantize(codes, params))
    assert found.input_scale == (0.5 if scheme.input_quantizer.static else None)
    assert scheme.bytes(*weight.shape) == (sum(one.nbytes for one in tensors.values()), len(tensors))
    assert tensors["weight"].dtype == scheme.grid.dtype


def test_a_row_of_zeros_stays_zero_and_nothing_is_not_finite(scheme: EightBits) -> None:
    params = scheme.search(weight_of(0), None)
    served = scheme.dequantize(scheme.quantize(weight_of(0), params), params)
    assert torch.equal(served[5], torch.zeros(96))
    assert torch.isfinite(served).all()


def test_one_scale_serves_all_rows_where_there_is_one_for_the_tensor() -> None:
    fp8 = SCHEMES["FP8"]
    for hessian in (None, hessian_of(3)):
        params = fp8.search(weight_of(2), hessian)
        codes = fp8.quantize(weight_of(2), params)
        refined = fp8.refine(codes, params, weight_of(2), hessian_of(3))
        for scale in (params["scale"], refined["scale"]):
            assert len(scale.unique()) == 1
        assert fp8.tensors(codes, refined)["weight_scale"].shape == (1,)


@pytest.mark.parametrize("method", ["search", "refine", "gptq"])
def test_each_step_errs_less_on_the_inputs_than_the_one_before(scheme: EightBits, method: str) -> None:
    weight, hessian = weight_of(4), hessian_of(5)

    def error(served: Tensor) -> float:
        off = served - weight
        return float(((off @ hessian) * off).sum())

    plain = scheme.search(weight, None)
    nearest = error(scheme.dequantize(scheme.quantize(weight, plain), plain))
    if method == "search":
        found = scheme.search(weight, hessian)
        assert error(scheme.dequantize(scheme.quantize(weight, found), found)) <= nearest * 1.001
    elif method == "refine":
        codes = scheme.quantize(weight, plain)
        assert error(scheme.dequantize(codes, scheme.refine(codes, plain, weight, hessian))) <= nearest
    else:
        assert error(Gptq().quantize(weight, hessian, scheme).dequantize()) < 0.6 * nearest


@pytest.mark.parametrize("grid", [INT8, FP8], ids=lambda grid: grid.name)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40), st.floats(0.125, 1024, width=32))
def test_rounding_inputs_by_token_moves_none_by_more_than_half_a_step_of_its_own_token(
    grid: Grid, values: list[float], factor: float
) -> None:
    row = torch.tensor([values])
    inputs = torch.cat([row, row * factor, torch.zeros_like(row)])
    rounded = InputQuantizer(grid).round(inputs)
    steps = inputs.abs().amax(1, keepdim=True) / grid.highest
    if grid is FP8:
        steps.clamp_(min=SMALLEST_FP8_SCALE)  # as vLLM has it
    half = 0.5 * steps if grid is INT8 else torch.maximum(inputs.abs() / 16, steps / 512)
    assert ((rounded - inputs).abs() <= half * 1.001 + 1e-12).all()
    assert torch.equal(rounded[2], torch.zeros(len(values)))


def test_a_static_scale_saturates_what_is_larger() -> None:
    quantizer = InputQuantizer(FP8, static=True)
    scale = quantizer.calibrated(torch.tensor([4.0, 2.0]), torch.tensor([[4.0, 2.0], [1.0, -2.0]]))
    assert scale is not None
    assert float(quantizer.round(torch.tensor([[1000.0, 1.0]]), scale)[0, 0]) == pytest.approx(448 * scale)


def test_codes_times_codes_is_what_rounded_inputs_and_the_served_weight_give(scheme: EightBits) -> None:
    linear = torch.nn.Linear(96, 48)
    params = scheme.search(linear.weight.detach(), None)
    codes = scheme.quantize(linear.weight.detach(), params)
    static = 0.02 if scheme.input_quantizer.static else None
    module = RoundingLinear(linear, codes.float(), params["scale"], scheme.input_quantizer, static)
    inputs = torch.randn(2, 7, 96, generator=torch.Generator().manual_seed(8))
    rounded = scheme.input_quantizer.round(inputs.view(-1, 96), static).view(2, 7, 96)
    expected = torch.nn.functional.linear(rounded, scheme.dequantize(codes, params), linear.bias)
    torch.testing.assert_close(module(inputs), expected, rtol=1e-4, atol=1e-4)
    assert module(inputs[:, :0]).shape == (2, 0, 48)  # an expert that no token is routed to


def test_a_cpu_takes_all_but_static_inputs() -> None:
    assert [name for name, one in SCHEMES.items() if one.obstacles("cpu")] == ["FP8"]


@pytest.mark.parametrize("shape", [(7, 33, 5), (0, 32, 8), (1, 1, 1), (64, 576, 96)], ids=str)
def test_products_of_int8_are_exact(shape: tuple[int, int, int]) -> None:
    tokens, inputs, outputs = shape
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(-127, 128, (tokens, inputs), generator=generator)
    weight = torch.randint(-127, 128, (outputs, inputs), generator=generator)
    found = int8_product(rows.to(torch.int8), weight.to(torch.int8))
    assert torch.equal(found, (rows @ weight.T).float())
