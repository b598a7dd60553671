"""The integer grid and its packing."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization.lifecycle.forward import dequantize

from lowbit_quantize.export import pack
from lowbit_quantize.grid import GridSpec, output_error, range_grid, round_to_grid

SPECS = [
    GridSpec(bits, size, symmetric)
    for bits in (4, 8)
    for size in (32, 64, None)
    for symmetric in (True, False)
]


def random_weight(rows: int = 64, columns: int = 192) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rounding_errs_at_most_half_a_step(spec: GridSpec) -> None:
    weight = random_weight()
    rounded = round_to_grid(weight, *range_grid(weight, spec), spec)
    step = rounded.scale.abs().repeat_interleave(spec.width(192), dim=1)
    reach = (
        1.0 if spec.symmetric else 0.5
    )  # the top half step of a symmetric grid is clipped; zeros are rounded
    assert (
        (weight - rounded.dequantize()).abs() <= (reach + 0.02) * step + (0 if spec.symmetric else step)
    ).all()
    assert rounded.codes.min() >= spec.lowest
    assert rounded.codes.max() <= spec.highest


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_symmetric_grid_may_be_mirrored_and_packing_keeps_every_value(spec: GridSpec) -> None:
    weight = random_weight()
    scale, zero = range_grid(weight, spec)
    if spec.symmetric:
        scale[::2] *= -1
    rounded = round_to_grid(weight, scale, zero, spec)
    tensors = pack(rounded)
    codes = unpack_from_int32(tensors["weight_packed"], spec.bits, torch.Size(weight.shape))
    assert torch.equal(codes, rounded.codes)
    zeros = None
    if not spec.symmetric:
        zeros = unpack_from_int32(
            tensors["weight_zero_point"], spec.bits, torch.Size(scale.shape), packed_dim=0
        )
    again = dequantize(codes, tensors["weight_scale"].float(), zeros)
    assert torch.equal(again, rounded.dequantize())


def test_output_error_is_the_mean_squared_output_difference() -> None:
    generator = torch.Generator().manual_seed(2)
    inputs, difference = torch.randn(500, 64, generator=generator), torch.randn(32, 64, generator=generator)
    explicit = (inputs @ difference.T).square().sum(1).mean()
    assert output_error(difference, inputs.T @ inputs / 500).item() == pytest.approx(
        explicit.item(), rel=1e-4
    )
