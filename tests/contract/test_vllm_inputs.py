"""Inputs are rounded as the installed vLLM rounds them."""

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from lowbit_quantize.schemes.grids import FP8, INT8
from lowbit_quantize.schemes.inputs import InputQuantizer

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture
def inputs() -> Tensor:
    """Tokens of very different sizes, one of them nothing."""
    rows = torch.randn(256, 576, generator=torch.Generator().manual_seed(0))
    rows *= torch.logspace(-4, 3, 256).unsqueeze(1)
    rows[7] = 0
    return rows.to(torch.bfloat16)


def test_int8_by_token(inputs: Tensor) -> None:
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("this is vLLM's build for another device")
    current_platform.import_kernels()
    codes, scales, _ = ops.onednn_scaled_int8_quant(inputs, None, None, True)
    ours, our_scales = InputQuantizer(INT8).encode(inputs)
    assert torch.equal(our_scales, scales)
    assert torch.equal(ours, codes.float())


@pytest.mark.parametrize("static", [False, True], ids=["by token", "one scale"])
def test_fp8(inputs: Tensor, static: bool) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    shape = GroupShape.PER_TENSOR if static else GroupShape.PER_TOKEN
    with set_current_vllm_config(VllmConfig()):
        theirs = QuantFP8(static=static, group_shape=shape)
    scale = torch.tensor([0.037]) if static else None
    codes, scales = theirs.forward_native(inputs, scale)
    ours, our_scales = InputQuantizer(FP8, static).encode(inputs, 0.037 if static else None)
    assert torch.equal(ours, codes.float())
    assert torch.equal(our_scales, scales.expand(256, 1))
