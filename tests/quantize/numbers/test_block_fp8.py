"""FP8 in blocks against its obvious slow version, and bounds that its search and its scales keep."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor, nn

from lowbit_quantize.methods.gptq import Gptq
from lowbit_quantize.methods.rtn import RoundToNearest
from lowbit_quantize.schemes.block_fp8 import BLOCK, BlockFP8
from lowbit_quantize.schemes.rounding_linear import RoundingLinear
from lowbit_quantize.schemes.scheme import Quantized
from lowbit_quantize.schemes.storage.stored_linears import OURS, reader_of, unpacked

SCHEME = BlockFP8()
GROUP = QuantizationScheme(targets=["Linear"], format="float-quantized", **SCHEME.quantization_args())
ROWS = [256, 320, 64]  # whole blocks, a short one at the end, less than one


def weight_of(rows: int, columns: int = 384) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    return weight * torch.logspace(-1, 1, columns)


def hessian_of(columns: int = 384) -> Tensor:
    inputs = torch.randn(4 * columns, columns, generator=torch.Generator().manual_seed(5))
    inputs = inputs @ torch.randn(columns, columns, generator=torch.Generator().manual_seed(6))
    return inputs.T @ inputs / len(inputs)


def slow(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and the scale of each block, one block at a time, from its range."""
    codes, scales = torch.zeros_like(weight), torch.zeros(-(-len(weight) // BLOCK), weight.shape[1] // BLOCK)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            place = (
                slice(row * BLOCK, (row + 1) * BLOCK),
                slice(column * BLOCK, (column + 1) * BLOCK),
            )
            scale = (weight[place].abs().max() / 448).to(torch.bfloat16).float()
            scales[row, column] = scale
            codes[place] = (weight[place] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return codes, scales


@pytest.mark.parametrize("rows", ROWS)
def test_rounding_to_nearest_is_what_one_block_at_a_time_gives(rows: int) -> None:
    weight = weight_of(rows)
    found = RoundToNearest().quantize(weight, torch.eye(384), SCHEME)
    codes, scales = slow(weight)
    assert torch.equal(found.codes.float(), codes)
    stored = found.tensors()
    assert torch.equal(stored["weight"].float(), codes)
    assert torch.equal(stored["weight_scale"].float(), scales)
    assert stored["weight_scale"].dtype == torch.bfloat16
    assert SCHEME.bytes(rows, 384) == (sum(one.nbytes for one in stored.values()), len(stored))


@pytest.mark.parametrize("rows", ROWS)
def test_what_is_stored_is_read_back_by_us_and_by_the_reader_that_knows_only_the_file(rows: int) -> None:
    found = RoundToNearest().quantize(weight_of(rows), torch.eye(384), SCHEME)
    stored = found.tensors()
    assert torch.equal(SCHEME.read(stored).dequantize(), found.dequantize())
    assert torch.equal(unpacked(stored, GROUP), found.dequantize())


@pytest.mark.parametrize("shape", [(256, 384), (128, 128), (128, 384), (320, 384), (256, 128), (64, 384)])
def test_the_library_opens_what_we_say_it_opens(shape: tuple[int, int]) -> None:
    """It guesses the blocks from the number of scales."""
    found = RoundToNearest().quantize(weight_of(*shape), torch.eye(shape[1]), SCHEME)
    codec = BaseCompressor.get_value_from_registry("float-quantized")
    try:
        weight = codec.decompress(dict(found.tensors()), GROUP)["weight"].float()
        right = torch.allclose(weight, found.dequantize(), rtol=0.01)
    except (RuntimeError, ValueError):
        right = False
    assert right == (reader_of(SCHEME, shape, expert=False) is None)
    assert reader_of(SCHEME, shape, expert=True) == OURS


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("diagonal", [True, False])
def test_a_search_by_what_errors_cost_never_costs_more_than_the_range(rows: int, diagonal: bool) -> None:
    weight, hessian = weight_of(rows), hessian_of()
    cost = hessian.diagonal()

    def of(params: dict[str, Tensor]) -> float:
        off = SCHEME.dequantize(SCHEME.quantize(weight, params), params) - weight
        return float((off.square() @ cost).sum())

    plain = of(dict(SCHEME.search(weight, None)))
    assert of(dict(SCHEME.search(weight, cost if diagonal else hessian))) <= plain * (1 + 1e-6)


@pytest.mark.parametrize("rows", ROWS)
def test_refined_scales_err_less_for_each_row_of_blocks_and_stay_one_a_block(rows: int) -> None:
    weight, hessian = weight_of(rows), hessian_of()
    params = SCHEME.search(weight, None)
    codes = SCHEME.quantize(weight, params)
    params = {
        "scale": (params["scale"] * 1.1).to(torch.bfloat16).float()
    }  # no longer the best for these codes
    after = SCHEME.refine(codes, params, weight, hessian)

    def errors(some: dict[str, Tensor]) -> Tensor:
        off = (SCHEME.dequantize(codes, some) - weight).double()
        of_rows = ((off @ hessian.double()) * off).sum(1)
        return torch.stack([part.sum() for part in of_rows.split(BLOCK)])

    assert (errors(dict(after)) <= errors(dict(params)) * (1 + 1e-6)).all()
    assert errors(dict(after)).sum() < 0.2 * errors(dict(params)).sum()
    for block in after["scale"].split(BLOCK):
        assert torch.equal(block, block[:1].expand_as(block))
    assert torch.equal(after["scale"], after["scale"].to(torch.bfloat16).float())
    assert (after["scale"] > 0).all()


def test_gptq_errs_less_than_rounding_and_several_at_once_are_what_each_is_alone() -> None:
    weights, hessian = torch.stack([weight_of(320), weight_of(320).flip(0)]), hessian_of()
    both = Gptq().quantize(weights, torch.stack([hessian, hessian]), SCHEME).split()
    for weight, found in zip(weights, both, strict=True):
        alone = Gptq().quantize(weight, hessian, SCHEME)
        assert torch.equal(alone.codes, found.codes)
        off, plain = (
            one.dequantize() - weight for one in (found, RoundToNearest().quantize(weight, hessian, SCHEME))
        )
        assert ((off @ hessian) * off).sum() < ((plain @ hessian) * plain).sum()


def test_rows_of_a_stack_that_begin_a_block_are_what_the_linear_is_by_itself() -> None:
    first, last = weight_of(256), weight_of(64)
    whole = RoundToNearest().quantize(torch.cat([first, last]), torch.eye(384), SCHEME)
    for weight, part in ((first, whole.rows(0, 256)), (last, whole.rows(256, 320))):
        alone = RoundToNearest().quantize(weight, torch.eye(384), SCHEME).tensors()
        assert all(torch.equal(value.float(), alone[name].float()) for name, value in part.tensors().items())


def test_all_zero_blocks_and_one_large_weight_give_finite_scales() -> None:
    weight = torch.zeros(256, 256)
    weight[0, 0] = 1e30
    for hessian in (torch.zeros(256, 256), torch.eye(256)):
        for method in (RoundToNearest(), Gptq()):
            found: Quantized = method.quantize(weight, hessian, SCHEME)
            assert torch.isfinite(found.params["scale"]).all()
            assert (found.params["scale"] > 0).all()
            assert torch.isfinite(found.dequantize()).all()


def test_a_linear_computes_with_sums_of_blocks_scaled_one_by_one() -> None:
    linear, weight = nn.Linear(384, 320), weight_of(320)
    found = RoundToNearest().quantize(weight, torch.eye(384), SCHEME)
    ours = RoundingLinear(linear, found.codes, found.params["scale"], SCHEME.input_quantizer, None)
    inputs = torch.randn(16, 384, generator=torch.Generator().manual_seed(9))
    rounded = SCHEME.input_quantizer.round(inputs.clone())
    wanted = rounded.double() @ found.dequantize().double().T + linear.bias.double()
    assert torch.allclose(ours(inputs).double(), wanted, rtol=1e-5, atol=1e-4)
    assert (rounded - inputs).abs().max() > 0
