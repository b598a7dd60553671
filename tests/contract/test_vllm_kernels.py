"""The conditions that `lowbit quantize --dry-run` states are those of the installed vLLM's kernels."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from lowbit_quantize.catalog import CATALOG
from lowbit_quantize.check.sharding import Shard, _shard_obstacles
from lowbit_quantize.schemes.integer import CPU_BITS, MARLIN_GROUPS, Integer

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (96, 96), (80, 96), (96, 40), (4096, 1024)])
def test_the_cpu_kernel_takes_the_same_shapes_and_bits(
    bits: int, symmetric: bool, inputs: int, outputs: int
) -> None:
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
    from vllm.platforms import current_platform
    from vllm.scalar_type import scalar_types

    if not current_platform.is_cpu():
        pytest.skip("this is vLLM's build for another device")
    types = {
        (4, True): scalar_types.uint4b8,
        (4, False): scalar_types.uint4,
        (8, True): scalar_types.uint8b128,
        (8, False): scalar_types.uint8,
    }
    config = MPLinearLayerConfig(
        full_weight_shape=(inputs, outputs),
        partition_weight_shape=(inputs, outputs),
        weight_type=types[bits, symmetric],
        act_type=torch.bfloat16,
        group_size=32,
        zero_points=not symmetric,
    )
    scheme = Integer(bits, 32, symmetric=symmetric, name="any")
    shard = Shard("mlp.down_proj", outputs, inputs, inputs, expert=False, scheme=scheme)
    ours = bits in CPU_BITS and not list(_shard_obstacles(shard, "cpu"))
    assert CPUWNA16LinearKernel.can_implement(config)[0] == ours


def test_the_kernels_named_for_cpus_are_vllms() -> None:
    from vllm.model_executor.kernels import linear
    from vllm.platforms.interface import PlatformEnum

    names = (
        "_POSSIBLE_KERNELS",
        "_POSSIBLE_INT8_KERNELS",
        "_POSSIBLE_FP8_KERNELS",
        "_POSSIBLE_FP8_BLOCK_KERNELS",
    )
    tables = [vars(linear)[name] for name in names]
    known = {kernel.__name__ for table in tables for kernel in table[PlatformEnum.CPU]}
    for preset in CATALOG.presets:
        scheme = preset.make(preset.group_size)
        assert bool(scheme.cpu_kernels) == (not scheme.obstacles("cpu"))
        assert set(scheme.cpu_kernels) <= known


def test_marlin_takes_the_same_groups() -> None:
    from vllm.model_executor.layers.quantization.utils.marlin_utils import MARLIN_SUPPORTED_GROUP_SIZES

    assert {-1 if size is None else size for size in MARLIN_GROUPS} == set(MARLIN_SUPPORTED_GROUP_SIZES)


@pytest.mark.parametrize(("inputs", "group"), [(96, 64), (128, 64), (96, 32)])
def test_vllm_refuses_the_same_straddling_groups(inputs: int, group: int) -> None:
    from vllm.distributed.utils import verify_group_size_divides_partition

    scheme = Integer(4, group, symmetric=True, name="any")
    straddles = bool(list(_shard_obstacles(Shard("mlp.down_proj", 64, inputs, 192, False, scheme), "gpu")))
    try:
        verify_group_size_divides_partition(inputs, group)
    except ValueError:
        assert straddles
    else:
        assert not straddles


def test_one_scale_serves_the_inputs_of_all_experts_of_a_layer() -> None:
    """Why static FP8 is refused for them: each was calibrated for itself."""
    from vllm.model_executor.layers.quantization.utils.fp8_utils import process_fp8_input_tensor_strategy_moe

    first, second = process_fp8_input_tensor_strategy_moe(
        torch.tensor([1.0, 3.0]), torch.tensor([2.0, 0.5]), False
    )
    assert (float(first), float(second)) == (3.0, 2.0)
    presets = {preset.name: preset.make(preset.group_size).experts.misfit for preset in CATALOG.presets}
    assert {name for name, misfit in presets.items() if misfit} == {"FP8", "W4A16_ASYM", "W4A8"}


def test_the_largest_of_their_global_scales_serves_all_that_is_fused() -> None:
    """Why q, k and v, and gate and up, share one in NVFP4."""
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w4a4_nvfp4 as nvfp4,
    )

    scheme = object.__new__(nvfp4.CompressedTensorsW4A4Fp4)
    scheme.use_a16, scheme.kernel = False, SimpleNamespace(process_weights_after_loading=lambda layer: None)
    layer = SimpleNamespace(
        weight_packed=torch.zeros(2, 8, dtype=torch.uint8),
        weight_global_scale=torch.tensor([2.0, 8.0]),
        input_global_scale=torch.tensor([4.0, 1.0]),
    )
    scheme.process_weights_after_loading(layer)
    assert float(layer.weight_global_scale) == 1 / 8
    assert float(layer.input_global_scale_inv) == 4


def test_experts_of_a_layer_have_the_smallest_global_scale_of_their_inputs() -> None:
    """Which is why those are powers of two: they round alike, whichever is taken."""
    from vllm.model_executor.layers.quantization.utils.flashinfer_fp4_moe import amax_for_moe_activation_quant

    reciprocals = 1 / torch.tensor([64.0, 16.0, 128.0])
    assert float(amax_for_moe_activation_quant(reciprocals, False)) == 1 / 16
