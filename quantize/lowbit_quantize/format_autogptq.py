"""AutoGPTQ's first format (`checkpoint_format: gptq`): 4 or 8 bits, packed along the inputs.

`w = scale · (code − zero)` with unsigned codes. What is stored of a zero point is one less than it is, and
readers add the one. Only symmetric grids are written: there the zero point is 2^(bits−1) everywhere. `g_idx`
names the group of each input; GPTQ's activation order here leaves groups where they are in memory, so it counts up.
Source: AutoGPTQ 0.7.1, auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py.
"""

from typing import Any

import torch
from torch import Tensor

from lowbit_quantize.grid import Rounded
from lowbit_quantize.packing import pack_last
from lowbit_quantize.recipe import Recipe

STORED_LESS = 1


def pack(rounded: Rounded) -> dict[str, Tensor]:
    """qweight (in · bits / 32, out), qzeros (groups, out · bits / 32), scales (groups, out) float16, g_idx (in,)."""
    spec, inputs = rounded.spec, rounded.codes.shape[1]
    groups = torch.arange(inputs, dtype=torch.int32) // (spec.group_size or inputs)  # (in,)
    return {
        "qweight": pack_last(rounded.codes.int() - spec.lowest, spec.bits).T,
        "qzeros": pack_last(rounded.zero.int().T - spec.lowest - STORED_LESS, spec.bits),
        "scales": rounded.scale.T.to(torch.float16),
        "g_idx": groups,
    }


def configuration(recipe: Recipe, _: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json, which AutoGPTQ itself reads from a file of its own."""
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": recipe.weights.bits,
        "group_size": recipe.weights.group_size,
        "sym": True,
        "desc_act": False,
        "static_groups": True,
    }
