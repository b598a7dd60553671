"""Scales of an FP8 cache by head: the installed vLLM loads them as they are stored, and which attention reads them."""

import inspect
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowbit_quantize.run.served_config import quantization_config
from lowbit_quantize.schemes.kv_cache import KVScales
from lowbit_quantize.walk.layer_writer import kv_tensors

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

SCALES = KVScales((0.5, 2.0, 0.25, 1.0), (0.125, 0.5, 4.0, 1.0))


class Attention(torch.nn.Module):
    """Stands for vLLM's layer: of it the method asks for the number of heads and a place for what it found."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.num_kv_heads = heads
        self._k_scale_cpu, self._v_scale_cpu = torch.zeros(1), torch.zeros(1)


def loaded(one_rank: Any, heads: int) -> Any:
    """What vLLM makes of our file of so many heads."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsKVCacheMethod,
    )

    written = quantization_config({}, [], fp8_cache=True, by_head=True)
    assert written is not None
    config: Any = SimpleNamespace(
        kv_cache_scheme=written["kv_cache_scheme"], total_num_heads=8, total_num_kv_heads=heads
    )
    method, layer = CompressedTensorsKVCacheMethod(config), Attention(heads)
    method.create_weights(layer)
    for name, tensor in kv_tensors("attention", SCALES).items():
        parameter = getattr(layer, name.removeprefix("attention."))
        parameter.weight_loader(parameter, tensor)
    method.process_weights_after_loading(layer)
    return layer


def test_every_head_gets_its_scale(one_rank: Any) -> None:
    layer = loaded(one_rank, 4)
    assert tuple(layer._k_scale.tolist()) == SCALES.k_scale
    assert tuple(layer._v_scale.tolist()) == SCALES.v_scale


def test_what_reads_one_number_reads_the_largest(one_rank: Any) -> None:
    """The CPU's attention does: why such a checkpoint is not served there."""
    from vllm.v1.attention.backends import cpu_attn

    layer = loaded(one_rank, 4)
    assert (layer._k_scale_float, layer._v_scale_float) == (2.0, 4.0)
    source = inspect.getsource(cpu_attn)
    assert "layer._k_scale_float" in source
    assert "layer._k_scale," not in source


def test_flash_attention_from_3_on_reads_them_and_no_other_backend_of_gpus_says_so() -> None:
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.attention.backends import flash_attn

    assert not AttentionBackend.supports_per_head_quant_scales()
    source = inspect.getsource(flash_attn.FlashAttentionBackend.supports_per_head_quant_scales)
    assert "fa_version >= 3" in source
