"""Linears of a loaded checkpoint that engines give rounded inputs: they compute here what engines compute.

compressed-tensors would do it otherwise: it unpacks the codes to bfloat16, and its dynamic int8 scale is absmax / 127.5
where vLLM's is absmax / 127. So each such linear is replaced before it is unpacked, of any tool's checkpoint.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit_core.errors import ModelError
from lowbit_quantize.schemes.grids import FP8, INT8
from lowbit_quantize.schemes.inputs import InputQuantizer
from lowbit_quantize.schemes.rounding_linear import RoundingLinear

GRIDS = {"int": INT8, "float": FP8}
EIGHT = 8


def round_inputs(model: Any) -> int:
    """Replace the linears of a model that transformers has loaded and not yet unpacked; returns how many there are."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)  # attention has a scheme of its own, for the cache
        and getattr(getattr(module, "quantization_scheme", None), "input_activations", None)
    ]
    for name, module in found:
        model.set_submodule(name, _rounding(name, module))
    return len(found)


def _rounding(name: str, linear: Any) -> RoundingLinear:
    weights, inputs = linear.quantization_scheme.weights, linear.quantization_scheme.input_activations
    grid = GRIDS.get(inputs.type)
    known = inputs.symmetric and inputs.type == weights.type
    known = known and inputs.num_bits == weights.num_bits == EIGHT
    known = known and weights.strategy in ("channel", "tensor") and inputs.strategy in ("token", "tensor")
    if not known or grid is None or bool(inputs.dynamic) != (inputs.strategy == "token"):
        raise ModelError(
            f"{name} rounds its inputs in a way that this Lowbit does not compute ({inputs.num_bits} bits, "
            f"{inputs.type}, {inputs.strategy}); serve the checkpoint and give --target URL"
        )
    scale: Tensor = linear.weight_scale.detach().float().view(-1, 1).expand(linear.out_features, 1)
    static = None if inputs.dynamic else float(linear.input_scale.detach())
    codes = linear.weight.detach().to(torch.bfloat16)
    return RoundingLinear(linear, codes, scale, InputQuantizer(grid, not inputs.dynamic), static)
