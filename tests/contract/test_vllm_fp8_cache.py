"""How vLLM's CPU engine writes an FP8 cache: saturating, and cut off toward zero where GPUs round to the nearest.

Quality is measured with rounding to the nearest (`schemes/kv_cache.py`), as GPUs do, and `lowbit serve` has the kernel
given what is rounded already (`engine/cpu_kv_cache.py`). The day that the first test fails, that can go.
"""

from collections.abc import Iterator

import pytest
import torch
from tests.e2e.greedy import cut_off

from lowbit_quantize.schemes.kv_cache import FP8, FP8_MAX

HEADS, SIZE, BLOCK = 2, 32, 128
NEEDS_AVX512 = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's FP8 cache on CPUs needs AVX-512"
)


def written(
    keys: torch.Tensor, values: torch.Tensor, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the cache holds of one token's keys and values, (heads, size), as codes without an order of their own."""
    ops = pytest.importorskip("vllm._custom_ops")
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("this is vLLM's build for another device")
    current_platform.import_kernels()
    caches = [torch.zeros(1, HEADS, BLOCK, SIZE, dtype=torch.uint8) for _ in range(2)]
    slot = torch.zeros(1, dtype=torch.int64)
    ops.cpu_attn_reshape_and_cache(keys[None], values[None], *caches, slot, "vec", scale, scale, "fp8")
    found = [cache.view(FP8).float().flatten() for cache in caches]
    return found[0][found[0] != 0].sort().values, found[1][found[1] != 0].sort().values


@NEEDS_AVX512
def test_keys_and_values_are_cut_off_toward_zero_and_saturate() -> None:
    values = (torch.randn(HEADS, SIZE, generator=torch.Generator().manual_seed(0)) * 150).to(torch.bfloat16)
    assert (values.abs() > FP8_MAX).any()  # these saturate
    wanted = cut_off(values)
    assert not torch.equal(
        wanted, values.float().clamp(-FP8_MAX, FP8_MAX).to(FP8).float()
    )  # nearest is another
    for found in written(values, values.clone()):
        assert torch.equal(found, wanted.flatten().sort().values)


@pytest.fixture
def rounding() -> Iterator[None]:
    """Our wrapper around vLLM's write, taken off again."""
    ops = pytest.importorskip("vllm._custom_ops")
    from lowbit_server.engine import cpu_kv_cache

    plain = ops.cpu_attn_reshape_and_cache
    cpu_kv_cache.round_to_nearest()
    cpu_kv_cache.round_to_nearest()  # a second time changes nothing
    yield
    ops.cpu_attn_reshape_and_cache = plain


@NEEDS_AVX512
@pytest.mark.parametrize("scale", [1.0, 0.0371, 0.3, 3.7])
def test_our_server_has_them_rounded_to_the_nearest(rounding: None, scale: float) -> None:
    """Divided by any scale and saturated, as the walk does."""
    values = (torch.randn(HEADS, SIZE, generator=torch.Generator().manual_seed(1)) * 150 * scale).to(
        torch.bfloat16
    )
    wanted = (values.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8).float().flatten().sort().values
    for found in written(values, values.clone(), scale):
        assert torch.equal(found, wanted[wanted != 0])
