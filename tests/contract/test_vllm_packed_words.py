"""vLLM's loader asks for the words that we write, of every number of bits."""

import inspect
from fractions import Fraction
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowbit_quantize.schemes.integer import Integer

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

BITS = range(2, 9)
OUTPUTS, INPUTS, GROUP = 96, 160, 32


def stored(bits: int, *, symmetric: bool) -> dict[str, torch.Tensor]:
    scheme = Integer(bits, GROUP, symmetric, "any")
    params = scheme.search(torch.randn(OUTPUTS, INPUTS), None)
    return scheme.tensors(torch.zeros(OUTPUTS, INPUTS, dtype=torch.int8), params)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_parameters_that_it_makes_have_our_shapes(one_rank: Any, symmetric: bool) -> None:
    """Of 4 bits, for which this processor has a kernel; other numbers of bits take the same lines."""
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("this is vLLM's build for another device")
    layer = torch.nn.Module()
    scheme = CompressedTensorsWNA16("group", 4, GROUP, symmetric)
    scheme.create_weights(layer, OUTPUTS, INPUTS, [OUTPUTS], INPUTS, torch.bfloat16, lambda *_: None)
    made = {name: tuple(one.shape) for name, one in layer.named_parameters()}
    ours = {name: tuple(one.shape) for name, one in stored(4, symmetric=symmetric).items()}
    assert made == ours


@pytest.mark.parametrize("bits", BITS)
def test_words_are_counted_by_the_same_lines_for_every_number_of_bits(vllm_config: Any, bits: int) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as moe,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16

    with set_current_vllm_config(vllm_config):
        assert CompressedTensorsWNA16("group", bits, GROUP, True).pack_factor == Fraction(32, bits)
    lines = inspect.getsource(CompressedTensorsWNA16.create_weights)
    assert "packed_input_dim = math.ceil(input_size_per_partition * self.num_bits / 32)" in lines
    assert "packed_output_dim = math.ceil(output_size_per_partition * self.num_bits / 32)" in lines
    words = moe.CompressedTensorsWNA16MoEMethod._packed_dim
    ours = stored(bits, symmetric=False)
    assert ours["weight_packed"].shape[1] == words(SimpleNamespace(num_bits=bits), INPUTS)
    assert ours["weight_zero_point"].shape[0] == words(SimpleNamespace(num_bits=bits), OUTPUTS)


def test_a_rank_that_holds_whole_groups_holds_whole_words() -> None:
    """vLLM cuts packed inputs where a rank's begin: at groups, which are multiples of 32 inputs."""
    for bits in BITS:
        assert (Fraction(GROUP) / Fraction(32, bits)).denominator == 1


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_experts_of_such_bits_are_hummings(bits: int) -> None:
    from vllm.model_executor.layers.fused_moe.experts import fused_humming_moe
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as moe,
    )
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape, QuantKey, ScaleDesc

    scale = ScaleDesc(dtype=torch.float16, static=True, group_shape=GroupShape(row=1, col=GROUP))
    key = QuantKey(moe.WNA16_SUPPORTED_TYPES_MAP[bits], scale, symmetric=True)
    assert fused_humming_moe.HummingIndexedExperts._supports_quant_scheme(key, None)
    assert not MarlinExperts._supports_quant_scheme(key, None)
    assert 'assert weight_quant.strategy == "group"' in inspect.getsource(moe)  # of all but Marlin's
    misfit = Integer(bits, None, True, f"W{bits}A16").experts.misfit
    assert misfit is not None
    assert "in groups only" in misfit
