"""Affine integers and their packing."""

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import dequantize

from lowbit_quantize.schemes.integer import PRESETS, Integer
from lowbit_quantize.schemes.numbers.affine import range_params, stored
from lowbit_quantize.schemes.scheme import Quantized
from lowbit_quantize.schemes.storage.packed_words import unpack
from lowbit_quantize.statistics.hessian import output_error

SCHEMES = [
    Integer(bits, size, symmetric, "a test's")
    for bits in (2, 3, 4, 5, 6, 8)
    for size in (32, 64, None)
    for symmetric in (True, False)
]


def random_weight(rows: int = 64, columns: int = 192) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_quantizing_errs_at_most_half_a_step(scheme: Integer) -> None:
    weight = random_weight()
    params = scheme.search(weight, None)
    codes = scheme.quantize(weight, params)
    step = params["scale"].abs().repeat_interleave(scheme.width(192), dim=1)
    # The top half step of a symmetric scheme is clipped; zeros are rounded.
    reach = 1.0 if scheme.symmetric else 0.5
    assert (
        (weight - scheme.dequantize(codes, params)).abs()
        <= (reach + 0.02) * step + (0 if scheme.symmetric else step)
    ).all()
    assert codes.min() >= scheme.lowest
    assert codes.max() <= scheme.highest


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_scale_may_be_negative_and_packing_keeps_every_value(scheme: Integer) -> None:
    weight = random_weight()
    scale, zero = range_params(scheme.split(weight), scheme)
    if scheme.symmetric:
        scale[::2] *= -1
    params = {"scale": scale, "zero": zero}
    quantized = Quantized(scheme.quantize(weight, params), params, scheme)
    tensors = quantized.tensors()
    codes = unpack(tensors["weight_packed"], scheme.bits, weight.shape[1])
    assert torch.equal(codes, quantized.codes)
    zeros = None
    if not scheme.symmetric:
        zeros = unpack(tensors["weight_zero_point"].T, scheme.bits, len(weight)).T
    again = dequantize(codes, tensors["weight_scale"].float(), zeros)
    assert torch.equal(again, quantized.dequantize())
    read = scheme.read(tensors)
    assert torch.equal(read.codes, quantized.codes)
    assert torch.equal(read.dequantize(), quantized.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("rows", [64, 40])  # 40 zero points of 4 bits do not fill their words
def test_the_forecast_of_a_linear_is_its_tensors_to_the_byte(scheme: Integer, rows: int) -> None:
    weight = random_weight(rows)
    params = scheme.search(weight, None)
    tensors = scheme.tensors(scheme.quantize(weight, params), params)
    assert scheme.bytes(*weight.shape) == (sum(tensor.nbytes for tensor in tensors.values()), len(tensors))


def test_rows_of_a_quantized_weight_are_those_of_the_whole() -> None:
    scheme = SCHEMES[0]
    weight = random_weight()
    params = scheme.search(weight, None)
    whole = Quantized(scheme.quantize(weight, params), params, scheme)
    assert torch.equal(whole.rows(8, 24).dequantize(), whole.dequantize()[8:24])


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_a_preset_makes_what_its_name_says(preset: object) -> None:
    made = preset.make("channel")  # type: ignore[attr-defined]
    assert f"W{made.bits}A16" + ("" if made.symmetric else "_ASYM") == made.name
    assert (made.group_size, preset.make(32).group_size) == (None, 32)  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [32, 64, None])
def test_a_width_that_groups_do_not_divide_is_a_misfit(size: int | None) -> None:
    scheme = Integer(4, size, symmetric=True, name="W4A16")
    assert scheme.misfit(192) is None
    assert scheme.misfit(200)


def test_a_stored_scale_is_exact_in_bfloat16_and_in_float16() -> None:
    scale = torch.exp(torch.linspace(-25, 11, 20001))
    held = stored(scale)
    assert torch.equal(held, held.to(torch.bfloat16).float())
    assert torch.equal(held, held.to(torch.float16).float())
    assert (held != 0).all()
    normal = scale > 2**-17  # below, float16 has fewer bits left than bfloat16
    assert torch.equal(held[normal], scale[normal].to(torch.bfloat16).float())


def test_output_error_is_the_mean_squared_output_difference() -> None:
    generator = torch.Generator().manual_seed(2)
    inputs, difference = torch.randn(500, 64, generator=generator), torch.randn(32, 64, generator=generator)
    explicit = (inputs @ difference.T).square().sum(1).mean()
    assert output_error(difference, inputs.T @ inputs / 500).item() == pytest.approx(
        explicit.item(), rel=1e-4
    )
