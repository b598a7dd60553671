"""NVFP4, MXFP4 and MXFP8: small floats in blocks, whose scales are small numbers too."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.quantize.numbers.test_eight_bits import hessian_of, weight_of
from torch import Tensor

from lowbit_quantize.device.memory import without_compiler
from lowbit_quantize.methods.gptq import Gptq
from lowbit_quantize.methods.method import refined_nearest
from lowbit_quantize.schemes.float_blocks import PRESETS, FloatBlocks
from lowbit_quantize.schemes.inputs import BlockInputs
from lowbit_quantize.schemes.numbers.grids import FP4, FP8, Grid
from lowbit_quantize.schemes.numbers.scale_grids import FP8_SCALES, POWERS_OF_TWO, ScaleGrid
from lowbit_quantize.schemes.rounding_linear import RoundingLinear
from lowbit_quantize.schemes.scheme import Quantized, Scheme, diagonal_blocks
from lowbit_quantize.schemes.search.block_search import Blocks
from lowbit_quantize.schemes.storage.packed_fp4 import MAGNITUDES, packed_fp4, unpacked_fp4
from lowbit_quantize.schemes.storage.stored_linears import parts_of, unpacked

with without_compiler():
    from compressed_tensors.compressors.mx_utils import compress_mx_scale
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp

SCHEMES = {preset.name: preset.make(preset.group_size) for preset in PRESETS}
ONE = torch.ones(1, 1)


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> FloatBlocks:
    found = SCHEMES[request.param]
    assert isinstance(found, FloatBlocks)
    return found


def quantized(scheme: Scheme, weight: Tensor, hessian: Tensor | None = None) -> Quantized:
    params = scheme.search(weight, hessian)
    return Quantized(scheme.quantize(weight, params), params, scheme)


def row_errors(served: Tensor, weight: Tensor, hessian: Tensor) -> Tensor:
    off = (served - weight).double()
    return ((off @ hessian.double()) * off).sum(-1)


def nearest_slowly(value: float) -> float:
    """Of two numbers as near, the one whose place in the row is even."""
    candidates = [(abs(abs(value) - one), place % 2, one) for place, one in enumerate(MAGNITUDES)]
    return min(candidates)[2] * (-1 if value < 0 else 1)


@given(
    st.lists(
        st.floats(-9, 9, width=16) | st.sampled_from([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0]),
        min_size=1,
    )
)
def test_four_bits_go_to_the_nearest_number_and_ties_to_the_even_one(values: list[float]) -> None:
    found = FP4.nearest_(torch.tensor(values, dtype=torch.float32))
    assert found.tolist() == [nearest_slowly(value) for value in values]


def test_numbers_beyond_the_grid_become_its_ends() -> None:
    ends = FP4.nearest_(torch.tensor([7.0, -9.0, 1e30, torch.inf]))
    assert ends.tolist() == [6, -6, 6, 6]


def test_what_is_packed_is_unpacked() -> None:
    codes = torch.tensor(MAGNITUDES).outer(torch.tensor([1.0, -1.0])).flatten().repeat(3, 2)
    packed = packed_fp4(codes)
    assert packed.shape == (3, 16)
    assert packed[0, :2].tolist() == [0x00, 0x91]  # 0, 0; 0.5 in the low bits, −0.5 above it
    assert torch.equal(unpacked_fp4(packed, torch.float32), codes)


@pytest.mark.parametrize("grid", [FP8_SCALES, POWERS_OF_TWO], ids=lambda grid: grid.name)
def test_neighbours_of_a_scale_are_the_next_numbers_and_none_is_zero(grid: ScaleGrid) -> None:
    lowest, highest = grid.ends
    values = grid.values_of(torch.arange(lowest - 9, highest + 9, dtype=torch.int32))
    assert (values > 0).all()
    assert torch.isfinite(values).all()
    assert (values.diff() >= 0).all()
    inside = values[9 : 9 + highest - lowest + 1]
    assert (inside.diff() > 0).all()
    assert torch.equal(grid.nearest(inside), inside)
    assert torch.equal(grid.read(grid.stored(inside)), inside)
    between = inside[:-1] * 0.49 + inside[1:] * 0.51
    assert torch.equal(grid.nearest(between), inside[1:])


def test_what_is_read_back_is_what_was_stored_and_takes_the_bytes_forecast(scheme: FloatBlocks) -> None:
    static = scheme.input_quantizer is not None and scheme.input_quantizer.static
    found = Gptq().quantize(weight_of(0), hessian_of(1), scheme)
    stored = Quantized(found.codes, found.params, scheme, 64.0 if static else None)
    tensors = stored.tensors()
    back = scheme.read(tensors)
    assert torch.equal(back.dequantize(), found.dequantize())
    assert back.input_scale == stored.input_scale
    assert scheme.bytes(*weight_of(0).shape) == (sum(one.nbytes for one in tensors.values()), len(tensors))


@pytest.mark.parametrize("searched", [False, True], ids=["plain", "searched"])
def test_compressed_tensors_unpacks_the_very_weight_that_is_served(
    scheme: FloatBlocks, searched: bool
) -> None:
    found = quantized(scheme, weight_of(2), hessian_of(3) if searched else None)
    group = QuantizationScheme(targets=["Linear"], format=scheme.format, **scheme.quantization_args())
    tensors = found.tensors()
    assert tensors.keys() == parts_of(group) - {"input_global_scale"}
    weight = unpacked(tensors, group)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, found.dequantize().to(torch.bfloat16))


def test_searched_weights_are_exact_in_bfloat16(scheme: FloatBlocks) -> None:
    served = Gptq().quantize(weight_of(4), hessian_of(5), scheme).dequantize()
    assert torch.equal(served.to(torch.bfloat16).float(), served)


@pytest.mark.parametrize("width", [32])
def test_the_plain_scales_of_microscaled_weights_are_compressed_tensors_own(width: int) -> None:
    weight = weight_of(6)
    weight[7, :32] = 0.0
    for name in ("MXFP4", "MXFP8"):
        scheme = SCHEMES[name]
        arguments: QuantizationArgs = scheme.quantization_args()["weights"]
        groups = weight.unflatten(-1, (-1, width))
        theirs, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
        ours = scheme.search(weight, None)["scale"]
        seen = groups.abs().amax(-1) > 0
        assert torch.equal(ours[seen], theirs[seen])
        stored = compress_mx_scale(ours, torch.uint8)
        assert torch.equal(stored, POWERS_OF_TWO.stored(ours))


@pytest.mark.parametrize("kind", ["zeros", "a row of zeros", "an outlier", "tiny", "huge"])
def test_no_scale_is_zero_or_infinite_whatever_the_weight(scheme: FloatBlocks, kind: str) -> None:
    weight = weight_of(7)
    if kind == "zeros":
        weight.zero_()
    elif kind == "an outlier":
        weight[2, 5] = 3e4
    elif kind in ("tiny", "huge"):
        weight *= 1e-25 if kind == "tiny" else 1e15
    for hessian in (None, hessian_of(8), torch.zeros(96, 96)):
        found = quantized(scheme, weight, hessian)
        refined = scheme.refine(
            found.codes, found.params, weight, hessian_of(8) if hessian is None else hessian
        )
        for params in (found.params, refined):
            for values in params.values():
                assert torch.isfinite(values).all()
                assert (values > 0).all()
        tensors = Quantized(found.codes, refined, scheme).tensors()
        for part, tensor in tensors.items():
            assert torch.isfinite(tensor.float()).all(), part
            assert part in ("weight", "weight_packed") or (tensor.float() > 0).all(), part
        served = found.dequantize()
        assert torch.isfinite(served).all()
        assert torch.equal(served[5], torch.zeros(96))


def test_all_rows_have_one_global_scale(scheme: FloatBlocks) -> None:
    if scheme.blocks.scales is POWERS_OF_TWO:
        assert "divisor" not in scheme.search(weight_of(9), None)
        return
    for hessian in (None, hessian_of(9)):
        found = quantized(scheme, weight_of(9), hessian)
        assert len(found.params["divisor"].unique()) == 1
        parts = [found.rows(start, start + 16).tensors() for start in (0, 16, 32)]
        assert len({float(part["weight_global_scale"]) for part in parts}) == 1
        assert parts[0]["weight_global_scale"].shape == (1,)


def test_the_largest_blocks_scale_is_the_largest_number_in_the_plain_rule() -> None:
    found = SCHEMES["NVFP4"].search(weight_of(10), None)
    assert float(found["scale"].max()) == 448
    assert float(found["divisor"][0]) == pytest.approx(448 * 6 / float(weight_of(10).abs().max()))


@pytest.mark.parametrize("diagonal", [False, True], ids=["blocks", "a diagonal"])
def test_a_block_has_the_best_of_the_scales_that_were_tried(scheme: FloatBlocks, diagonal: bool) -> None:
    weight, hessian, blocks = weight_of(11)[:6], hessian_of(12), scheme.blocks
    cost = hessian.diagonal() if diagonal else hessian
    found, errors = blocks.best(weight, diagonal_blocks(cost, blocks.width), ONE)
    widest = weight.unflatten(-1, (-1, blocks.width)).abs().amax(-1)
    for row in range(len(weight)):
        for group in range(found.shape[1]):
            where = slice(group * blocks.width, (group + 1) * blocks.width)
            part, own = weight[row, where], hessian[where, where]
            own = own.diagonal().diag() if diagonal else own
            first = blocks.scales.bytes_of(widest[row, group] / blocks.numbers.highest)
            tried = {float(blocks.scales.values_of(first + step)) for step in blocks.scales.around}
            slowly = {scale: _error(part, own, scale, blocks.numbers) for scale in tried}
            assert float(errors[row, group]) == pytest.approx(min(slowly.values()), rel=1e-4, abs=1e-9)
            assert slowly[float(found[row, group])] == pytest.approx(min(slowly.values()), rel=1e-4, abs=1e-9)


def _error(part: Tensor, hessian: Tensor, scale: float, numbers: Grid) -> float:
    off = numbers.nearest_(part / scale) * scale - part
    return float(off @ hessian @ off)


def test_a_block_may_end_at_four_where_that_errs_less() -> None:
    """4, 3, 2 and 1 are numbers of the grid; under a scale by which 4 becomes 6 most of them are not."""
    weight = torch.tensor([4.0, 3, 2, 1, 4, 3, 2, 1, 4, 3, 2, 1, 4, 3, 2, 1]).repeat(2, 1)
    for global_scale in (1.0, 3.7):
        found = quantized(SCHEMES["NVFP4A16"], weight * global_scale, torch.eye(16))
        torch.testing.assert_close(found.dequantize(), weight * global_scale, rtol=0.07, atol=0)
    exact = quantized(SCHEMES["NVFP4A16"], weight, torch.eye(16))
    assert torch.equal(exact.dequantize(), weight)


def test_the_global_scale_is_chosen_with_the_scales_of_the_blocks() -> None:
    """Blocks far below the largest: under the plain global scale they are denormal FP8 numbers, or nothing."""
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(13))
    weight[0, 0] = 6e4
    scheme, hessian = SCHEMES["NVFP4A16"], torch.eye(96)
    errors = []
    for found in (quantized(scheme, weight), quantized(scheme, weight, hessian)):
        errors.append(float(row_errors(found.dequantize(), weight, hessian)[1:].sum()))
    assert errors[1] < 0.97 * errors[0]


@pytest.mark.parametrize("seed", range(4))
def test_refined_scales_never_raise_a_rows_error_and_lower_the_sum(scheme: FloatBlocks, seed: int) -> None:
    weight, hessian = weight_of(seed), hessian_of(seed + 50)
    found = quantized(scheme, weight, hessian)
    refined = scheme.refine(found.codes, found.params, weight, hessian)
    before = row_errors(found.dequantize(), weight, hessian)
    after = row_errors(scheme.dequantize(found.codes, refined), weight, hessian)
    assert (after <= before * 1.0001 + 1e-9).all()
    assert scheme.blocks.scales is POWERS_OF_TWO or after.sum() < 0.95 * before.sum()
    assert torch.equal(refined["scale"], scheme.blocks.scales.nearest(refined["scale"]))


def test_each_method_errs_less_than_the_one_before(scheme: FloatBlocks) -> None:
    weight, hessian = weight_of(14), hessian_of(15)
    served = [
        quantized(scheme, weight).dequantize(),
        refined_nearest(weight, hessian, scheme).dequantize(),
        Gptq().quantize(weight, hessian, scheme).dequantize(),
    ]
    plain, refined, compensated = (float(row_errors(one, weight, hessian).sum()) for one in served)
    assert refined < plain
    assert compensated < 0.2 * refined


def test_several_weights_at_once_become_what_each_becomes_alone(scheme: FloatBlocks) -> None:
    weights = torch.stack([weight_of(16), weight_of(17) * 40])
    hessians = torch.stack([hessian_of(18), hessian_of(19)])
    together = Gptq().quantize(weights, hessians, scheme).split()
    for one, weight, hessian in zip(together, weights, hessians, strict=True):
        alone = Gptq().quantize(weight, hessian, scheme)
        assert torch.equal(one.codes, alone.codes)
        assert all(torch.equal(one.params[name], alone.params[name]) for name in alone.params)


def test_trial_errors_fall_where_a_search_errs_less(scheme: FloatBlocks) -> None:
    weight, hessian = weight_of(20), hessian_of(21)
    blocks = diagonal_blocks(hessian, scheme.width(96))
    trial = scheme.trial_error(weight, blocks)
    whole = float(scheme.blocks.best(weight, blocks, scheme._room(weight))[1].sum())
    assert whole <= trial < 3 * whole


@pytest.mark.parametrize("name", ["MXFP4", "MXFP8"])
def test_inputs_are_rounded_as_compressed_tensors_rounds_them(name: str) -> None:
    quantizer, arguments = (
        SCHEMES[name].input_quantizer,
        SCHEMES[name].quantization_args()["input_activations"],
    )
    assert isinstance(quantizer, BlockInputs)
    inputs = torch.randn(64, 96, generator=torch.Generator().manual_seed(22)) * torch.logspace(
        -3, 3, 64
    ).unsqueeze(1)
    scales, _ = compute_dynamic_scales_and_zp(inputs, arguments, torch.nn.Linear(1, 1))
    groups = inputs.unflatten(-1, (-1, 32))
    expected = quantizer.grid.nearest_(groups / scales.unsqueeze(-1)) * scales.unsqueeze(-1)
    assert torch.equal(quantizer.round(inputs), expected.flatten(-2))


def test_inputs_of_another_power_of_two_under_the_global_scale_round_alike() -> None:
    """Engines take the largest of what they fuse, and some of all experts of a layer."""
    quantizer = SCHEMES["NVFP4"].input_quantizer
    assert isinstance(quantizer, BlockInputs)
    inputs = torch.randn(64, 96, generator=torch.Generator().manual_seed(23))
    scale = quantizer.calibrated(inputs.abs().amax(0), inputs)
    assert scale is not None
    assert scale == 2.0 ** round(torch.tensor(scale).log2().item())
    for other in (scale / 2, scale / 16, scale / 64):
        assert torch.equal(quantizer.round(inputs, other), quantizer.round(inputs, scale))


def test_a_linear_that_has_read_nothing_has_a_finite_global_scale() -> None:
    quantizer = SCHEMES["NVFP4"].input_quantizer
    assert isinstance(quantizer, BlockInputs)
    for absmax in (torch.zeros(32), torch.zeros(0)):
        scale = quantizer.calibrated(absmax, torch.zeros(0, len(absmax)))
        assert scale is not None
        assert 0 < scale < 2.0**40
        assert torch.equal(quantizer.round(torch.zeros(3, 32), scale), torch.zeros(3, 32))


def test_numbers_times_numbers_is_what_rounded_inputs_and_the_served_weight_give(scheme: FloatBlocks) -> None:
    if scheme.input_quantizer is None:
        pytest.skip("inputs stay as they are")
    linear = torch.nn.Linear(96, 48)
    inputs = torch.randn(2, 7, 96, generator=torch.Generator().manual_seed(24))
    static = scheme.input_quantizer.calibrated(inputs.abs().amax((0, 1)), inputs[0])
    for hessian in (None, hessian_of(25)):
        found = quantized(scheme, linear.weight.detach(), hessian)
        module = RoundingLinear(linear, *found.factors(), scheme.input_quantizer, static)
        rounded = scheme.input_quantizer.round(inputs.view(-1, 96), static).view(2, 7, 96)
        expected = torch.nn.functional.linear(rounded, found.dequantize(), linear.bias)
        assert module.weight.dtype == torch.bfloat16
        torch.testing.assert_close(module(inputs), expected, rtol=1e-4, atol=1e-4)


def test_no_cpu_takes_them_and_blocks_must_be_whole(scheme: FloatBlocks) -> None:
    assert scheme.obstacles("gpu") == []
    assert f"no CPU kernel for {scheme.name}" in scheme.obstacles("cpu")[0]
    assert scheme.misfit(96) is None
    assert "no multiple of its blocks" in str(scheme.misfit(104))


def test_blocks_of_eight_bits_may_not_be_scaled_beyond_a_float() -> None:
    blocks = Blocks(FP8, POWERS_OF_TWO, 32)
    weight = torch.full((2, 32), 1e30)
    scale, errors = blocks.best(weight, torch.ones(1, 32), ONE)
    assert torch.isfinite(scale).all()
    assert torch.isfinite(blocks.encode(weight, scale, ONE)).all()
    assert errors.shape == (2, 1)
