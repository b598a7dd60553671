"""Linears of a loaded checkpoint that engines give rounded inputs: they compute here what engines compute.

compressed-tensors would do it otherwise: it unpacks the codes to bfloat16, and its dynamic int8 scale is absmax / 127.5
where vLLM's is absmax / 127. So each such linear is replaced before it is unpacked, of any tool's checkpoint. What
rounds in another way (FP8 in blocks of other sizes, zero points) is left to compressed-tensors, with a warning.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lowbit_core.log import get_logger
from lowbit_quantize.schemes import block_fp8, float_blocks, rounded_integers
from lowbit_quantize.schemes.eight_bits import EightBits
from lowbit_quantize.schemes.inputs import InputQuantizer
from lowbit_quantize.schemes.numbers.grids import FP8, INT8
from lowbit_quantize.schemes.rounding_linear import RoundingLinear
from lowbit_quantize.schemes.scheme import Scheme

GRIDS = {"int": INT8, "float": FP8}
EIGHT = 8
PRESETS = (*block_fp8.PRESETS, *float_blocks.PRESETS, *rounded_integers.PRESETS)
ARGUMENTS = ("num_bits", "type", "strategy", "group_size", "block_structure", "symmetric", "dynamic")

log = get_logger("evaluate")


def round_inputs(model: Any) -> int:
    """Replace the linears of a model that transformers has loaded and not yet unpacked; returns how many were."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)  # attention has a scheme of its own, for the cache
        and getattr(getattr(module, "quantization_scheme", None), "input_activations", None)
    ]
    schemes = [(name, module, known_scheme(module.quantization_scheme)) for name, module in found]
    known = [(name, module, scheme) for name, module, scheme in schemes if scheme is not None]
    for name, module, scheme in known:
        model.set_submodule(name, _rounding(module, scheme))
    if len(known) < len(found):
        log.warning(
            "%d linears round what they read in a way that is left to compressed-tensors; engines may differ",
            len(found) - len(known),
        )
    return len(known)


def known_scheme(found: Any) -> Scheme | None:
    """Ours that rounds weights and inputs as one of compressed-tensors does; None of one that is not computed here."""
    if found.input_activations is None or found.weights is None:
        return None
    for preset in PRESETS:
        size = preset.group_size if preset.fixed_size else found.weights.group_size or "channel"
        scheme = preset.make(size)
        arguments = scheme.quantization_args()
        if "input_activations" in arguments and all(
            _same(getattr(found, part), arguments[part]) for part in ("weights", "input_activations")
        ):
            return scheme
    return _eight_bits(found)


def rounding_linear(linear: nn.Linear, scheme: Scheme, parts: Mapping[str, Tensor]) -> RoundingLinear:
    """What takes the place of a linear that is stored in a scheme whose inputs are rounded, as `parts`."""
    quantizer, stored = scheme.input_quantizer, scheme.read(parts)
    assert quantizer is not None, f"{scheme.name} leaves inputs as they are"
    return RoundingLinear(linear, *stored.factors(), quantizer, stored.input_scale)


def _same(one: Any, other: Any) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in ARGUMENTS)


def _eight_bits(found: Any) -> Scheme | None:
    """Codes of eight bits on both sides: weights by channel or as a whole, inputs by token or under one scale."""
    weights, inputs = found.weights, found.input_activations
    eight = inputs.num_bits == weights.num_bits == EIGHT and inputs.type == weights.type
    kinds = (
        weights.strategy in ("channel", "tensor"),
        inputs.strategy == ("token" if inputs.dynamic else "tensor"),
    )
    if not inputs.symmetric or not eight or not all(kinds):
        return None
    grid = GRIDS[weights.type]
    quantizer = InputQuantizer(grid, static=not inputs.dynamic)
    return EightBits("of another tool", grid, weights.strategy == "channel", quantizer)


def _rounding(linear: Any, scheme: Scheme) -> RoundingLinear:
    return rounding_linear(
        linear, scheme, {name: part.detach() for name, part in linear.state_dict().items()}
    )
