"""Products at less cost: of bfloat16 numbers in float32 and of int8 numbers in int32, where nothing is lost by it.

The product of two bfloat16 numbers is exact in float32, so hardware that multiplies bfloat16 and accumulates
in float32 gives the same sums as float32 arithmetic, up to their order. Sums of int8 products are exact.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from lowbit_core.cpu_speeds import instructions

INT8_SETS = ("amx_int8", "avx512_bf16", "avx512_vnni")  # elsewhere torch's own loop is slower than float32


@cache
def _here() -> str | None:
    return instructions()


def multiplies_int8(device: torch.device) -> bool:
    """Whether this processor multiplies int8 numbers several times as fast as float32 ones."""
    return device.type == "cpu" and _here() in INT8_SETS


def rounds_products(numbers: Tensor) -> bool:
    """Whether products of these cost half as much on this processor if what they add up to is rounded to bfloat16.

    With AMX they cost no more in float32 (`exact_products`), and without bfloat16's own multiplies nothing is saved.
    """
    return numbers.dtype == torch.bfloat16 and numbers.device.type == "cpu" and _here() == "avx512_bf16"


def int8_product(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows @ weight.T` of int8 numbers, (tokens, in) and (out, in), as float32."""
    product: Tensor = torch._int_mm(rows, weight.T)
    return product.float()


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 products on the CPU use bfloat16 multipliers while the block runs, if `dtype` is bfloat16.

    Only for factors that were bfloat16 and were widened; any others would be rounded.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    if dtype == torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
