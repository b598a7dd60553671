"""Float32 products at half the cost, where the factors are bfloat16 numbers and nothing is lost by it.

The product of two bfloat16 numbers is exact in float32, so hardware that multiplies bfloat16 and accumulates
in float32 gives the same sums as float32 arithmetic, up to their order.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
