"""Linears of a loaded checkpoint that engines give rounded inputs: they compute here what engines compute.

compressed-tensors would do it otherwise: it unpacks the codes to bfloat16, and its dynamic int8 scale is absmax / 127.5
where vLLM's is absmax / 127. So each such linear is replaced before it is unpacked, of any tool's checkpoint. What
rounds in another way (FP8 in blocks, 4-bit floats, zero points) is left to compressed-tensors, with a warning.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_core.log import get_logger
from lowbit_quantize.schemes.grids import FP8, INT8
from lowbit_quantize.schemes.inputs import InputQuantizer
from lowbit_quantize.schemes.rounding_linear import RoundingLinear

GRIDS = {"int": INT8, "float": FP8}
EIGHT = 8

log = get_logger("evaluate")


def round_inputs(model: Any) -> int:
    """Replace the linears of a model that transformers has loaded and not yet unpacked; returns how many were."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)  # attention has a scheme of its own, for the cache
        and getattr(getattr(module, "quantization_scheme", None), "input_activations", None)
    ]
    known = [(name, module) for name, module in found if is_known(module.quantization_scheme)]
    for name, module in known:
        model.set_submodule(name, _rounding(module))
    if len(known) < len(found):
        log.warning(
            "%d linears round what they read in a way that is left to compressed-tensors; engines may differ",
            len(found) - len(known),
        )
    return len(known)


def is_known(scheme: Any) -> bool:
    """Whether a scheme of compressed-tensors rounds inputs in a way that is computed here."""
    weights, inputs = scheme.weights, scheme.input_activations
    if (
        inputs is None
        or not inputs.symmetric
        or inputs.type != weights.type
        or not inputs.num_bits == weights.num_bits == EIGHT
    ):
        return False
    return weights.strategy in ("channel", "tensor") and inputs.strategy == (
        "token" if inputs.dynamic else "tensor"
    )


def rounding_linear(linear: nn.Linear, scheme: Any, parts: Mapping[str, Tensor]) -> RoundingLinear:
    """What takes the place of a linear that is stored in such a scheme, as `parts`."""
    inputs = scheme.input_activations
    scale: Tensor = parts["weight_scale"].float().view(-1, 1).expand(linear.out_features, 1)
    static = None if inputs.dynamic else float(parts["input_scale"])
    quantizer = InputQuantizer(GRIDS[inputs.type], not inputs.dynamic)
    return RoundingLinear(linear, parts["weight"].to(torch.bfloat16), scale, quantizer, static)


def _rounding(linear: Any) -> RoundingLinear:
    parts = {name: tensor.detach() for name, tensor in linear.state_dict().items()}
    return rounding_linear(linear, linear.quantization_scheme, parts)
