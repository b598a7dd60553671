"""An FP8 cache on CPUs, rounded to the nearest number as GPUs round it and as quality is measured.

vLLM 0.32's CPU kernel cuts off toward zero when it writes (`tests/contract/test_vllm_fp8_cache.py`), which more than
doubles what the cache costs (`benchmarks/kv_cache`). It is given keys and values that are FP8 numbers already, and a
scale of one: nothing is left to cut off. What it reads is unchanged: code × scale.
"""

import torch
from torch import Tensor
from vllm import _custom_ops

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
ROUNDED = ("fp8", "fp8_e4m3")  # what vLLM calls a cache of this type
WRITE = "cpu_attn_reshape_and_cache"


def round_to_nearest() -> None:
    """Wrap vLLM's write to the cache, once in a process; nothing where vLLM has none."""
    write = getattr(_custom_ops, WRITE, None)
    if write is None or hasattr(write, "rounds"):
        return

    def rounded(
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
        isa: str,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        kv_cache_dtype: str = "auto",
    ) -> None:
        if kv_cache_dtype in ROUNDED:
            key, value = nearest(key, k_scale), nearest(value, v_scale)
            k_scale = v_scale = 1.0
        write(key, value, key_cache, value_cache, slot_mapping, isa, k_scale, v_scale, kv_cache_dtype)

    rounded.rounds = True  # type: ignore[attr-defined]
    setattr(_custom_ops, WRITE, rounded)


def nearest(values: Tensor, scale: float) -> Tensor:
    """`values` / `scale` as the nearest FP8 numbers, saturated, in their own dtype, which holds them exactly."""
    return (values.float() / scale).clamp(-LARGEST, LARGEST).to(FP8).to(values.dtype)
