"""AutoAWQ's GEMM format: 4 bits, packed along the outputs in an interleaved order.

`w = scale · (code − zero)` with codes and zeros in [0, 15]. The format always has zero points; a symmetric grid
has 8 everywhere. Scales are factors: nothing that reads the format asks for a sign (docs/checkpoint.md).
Source: AutoAWQ 0.2.9, awq/modules/linear/gemm.py and awq/utils/packing_utils.py.
"""

from typing import Any

import torch
from torch import Tensor

from lowbit_quantize.grid import Rounded
from lowbit_quantize.packing import pack_last
from lowbit_quantize.recipe import Recipe

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs each field of a word holds, lowest bits first


def pack(rounded: Rounded) -> dict[str, Tensor]:
    """qweight (in, out / 8) int32, qzeros (groups, out / 8) int32, scales (groups, out) float16."""
    bits, lowest = rounded.spec.bits, rounded.spec.lowest
    return {
        "qweight": pack_last(rounded.codes.int().T - lowest, bits, ORDER),
        "qzeros": pack_last(rounded.zero.int().T - lowest, bits, ORDER),
        "scales": rounded.scale.T.to(torch.float16),
    }


def configuration(recipe: Recipe, ignored: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": recipe.weights.bits,
        "group_size": recipe.weights.group_size,
        "zero_point": True,
        "modules_to_not_convert": ignored,
    }
