"""Inputs are rounded as the installed vLLM rounds them."""

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from lowbit_quantize.schemes.inputs import BlockInputs, InputQuantizer
from lowbit_quantize.schemes.numbers.grids import FP4, FP8, INT8
from lowbit_quantize.schemes.rounded_integers import kept_scales

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


@pytest.mark.parametrize("scale", [64.0, 37.3])
def test_nvfp4_in_blocks_under_one_scale(inputs: Tensor, scale: float) -> None:
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import ref_nvfp4_quant

    codes, scales = ref_nvfp4_quant(inputs, torch.tensor(scale), 16)
    theirs = codes.unflatten(-1, (-1, 16)) * scales.unsqueeze(-1)
    ours, after = BlockInputs(FP4, static=True, width=16).encode(inputs, scale)
    assert torch.equal(ours, theirs.flatten(-2))
    assert torch.equal(after, torch.full((256, 1), 1 / scale))


def test_mxfp8_in_blocks(inputs: Tensor) -> None:
    from vllm.model_executor.layers.quantization.utils.mxfp8_utils import _mxfp8_e4m3_quantize_torch

    codes, exponents = _mxfp8_e4m3_quantize_torch(inputs)
    scales = torch.exp2(exponents.float() - 127).unsqueeze(-1)
    theirs = (codes.float().unflatten(-1, (-1, 32)) * scales).flatten(-2)
    ours, _ = BlockInputs(FP8, width=32).encode(inputs)
    assert torch.equal(ours, theirs)


def test_hoppers_kernel_leaves_the_scales_of_w4afp8_as_they_are() -> None:
    """`convert_bf16_scales_to_fp8`, which asks for a GPU: QuantFP8 by row, an eighth of it in FP8, times eight."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    generator = torch.Generator().manual_seed(1)
    scale = torch.randn(64, 24, generator=generator) * torch.logspace(-2, 0, 64).unsqueeze(1)
    with set_current_vllm_config(VllmConfig()):
        quantize = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN)

    def served(stored: Tensor) -> Tensor:
        codes, row = quantize.forward_native(stored.to(torch.bfloat16))
        found: Tensor = (codes.float() / 8).to(torch.float8_e4m3fn).float() * (row * 8)
        return found

    kept = kept_scales(scale)
    torch.testing.assert_close(served(kept), kept, rtol=2**-7, atol=0)
    assert ((served(scale) - scale).abs() / scale.abs()).max() > 0.05
    assert ((kept - scale).abs() <= scale.abs() / 15 + kept.abs().amax(1, keepdim=True) / 448 / 64).all()
