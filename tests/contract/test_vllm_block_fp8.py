"""FP8 in blocks is stored, split and rounded as the installed vLLM asks for it."""

import inspect
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit_quantize.schemes.block_fp8 import BLOCK, BlockFP8
from lowbit_quantize.schemes.inputs import SMALLEST_GROUP_ABSMAX, GroupInputs
from lowbit_quantize.schemes.numbers.grids import FP8

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture
def inputs() -> Tensor:
    """Tokens of very different sizes, of 5 groups."""
    rows = torch.randn(256, 640, generator=torch.Generator().manual_seed(0))
    return (rows * torch.logspace(-1, 3, 256).unsqueeze(1)).to(torch.bfloat16)


def test_inputs_are_rounded_in_groups_as_vllm_rounds_them(vllm_config: Any, inputs: Tensor) -> None:
    """Its PyTorch form; it differs from the GPU's in how small a scale may be, which these inputs do not reach."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    with set_current_vllm_config(vllm_config):
        theirs = QuantFP8(static=False, group_shape=GroupShape(1, BLOCK), use_ue8m0=False)
    codes, scales = theirs.forward_native(inputs)
    ours, our_scales = GroupInputs(FP8, width=BLOCK).encode(inputs)
    assert torch.equal(our_scales, scales)
    assert torch.equal(ours, codes.float())


def test_the_kernel_for_groups_has_our_smallest_magnitude_and_takes_no_part_of_a_group(
    inputs: Tensor,
) -> None:
    from vllm.model_executor.layers.quantization.utils.fp8_utils import per_token_group_quant_fp8

    assert inspect.signature(per_token_group_quant_fp8).parameters["eps"].default == SMALLEST_GROUP_ABSMAX
    with pytest.raises(AssertionError, match="must be divisible"):
        per_token_group_quant_fp8(inputs[:, :576], BLOCK, use_ue8m0=False)
    assert BlockFP8().misfit(576)
    assert BlockFP8().misfit(640) is None
    codes, scales = GroupInputs(FP8, width=BLOCK).encode(torch.zeros(2, BLOCK))
    assert not codes.any()
    assert float(scales.min()) == pytest.approx(1e-10 / 448)


@pytest.mark.parametrize(
    "outputs", [(256, 128, 128), (256, 128, 64), (256, 64, 128), (192,), (384, 384), (320, 320), (128,)]
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_vllm_makes_one_matrix_of_the_same_linears(
    one_rank: Any, outputs: tuple[int, ...], ranks: int
) -> None:
    from vllm.model_executor.layers.quantization.utils.fp8_utils import validate_fp8_block_shape

    layer: Any = torch.nn.Module()
    layer.tp_size = ranks
    ours = BlockFP8().outputs_misfit(outputs, split=ranks > 1)
    try:
        validate_fp8_block_shape(layer, 512, sum(outputs) * ranks, 512, list(outputs), [BLOCK, BLOCK])
    except ValueError:
        assert ours
    else:
        assert ours is None


@pytest.mark.parametrize("outputs", [256, 320, 64])
def test_the_scales_that_vllm_allocates_have_our_shape(one_rank: Any, outputs: int) -> None:
    from vllm.model_executor.layers.quantization.utils.fp8_utils import create_fp8_scale_parameter
    from vllm.model_executor.parameter import BlockQuantScaleParameter

    allocated = create_fp8_scale_parameter(
        BlockQuantScaleParameter, [outputs], 512, [BLOCK, BLOCK], lambda *_: None
    )
    scheme, weight = BlockFP8(), torch.randn(outputs, 512)
    params = scheme.search(weight, None)
    ours = scheme.tensors(scheme.quantize(weight, params), params)["weight_scale"]
    assert tuple(allocated.shape) == tuple(ours.shape)
    assert torch.equal(allocated.new_empty(ours.shape).copy_(ours), ours.float())  # float32 holds it


@pytest.mark.parametrize("middle", [128, 192, 384])
def test_experts_fill_the_same_blocks(one_rank: Any, middle: int) -> None:
    from vllm.model_executor.layers.quantization.utils.fp8_utils import validate_fp8_block_shape_moe

    ours = BlockFP8().expert_obstacles("gpu", 256, middle)
    try:
        validate_fp8_block_shape_moe(middle, [BLOCK, BLOCK])
    except ValueError:
        assert ours
    else:
        assert not ours
