"""Routed experts in numbers that plain transformers does not open, or opens without rounding what they read.

transformers (5.19) stacks a layer's experts and unpacks them itself, from FP8 and packed integers only; int8 experts
(`int-quantized`) and floats in blocks (`nvfp4-pack-quantized`, `mxfp4-pack-quantized`, `mxfp8-quantized`) end in an
error. Each is an ordinary linear of compressed-tensors' though, whose own codec unpacks it,
and the rest of the checkpoint is transformers' under a configuration that says these experts are not quantized.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from lowbit_core.errors import ModelError
from lowbit_quantize.device.memory import without_compiler

with without_compiler():  # the library compiles a function for 4-bit floats, which is not called here
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

READER = "compressed-tensors"
OPENED_FORMATS = ("pack-quantized", "float-quantized", "naive-quantized")  # by transformers, of experts
PATTERN, EVERY_LINEAR = "re:", "Linear"
NO_EXPERTS = "re:^no_module_has_this_name[.]experts$"


def read_plain_experts(quantization: dict[str, Any]) -> None:
    """Make transformers read routed experts that are not quantized, where other things are.

    transformers (5.19) unpacks a model's experts by the first group whose pattern says "experts", else by any
    group, whether or not they are quantized; only under an FP8 scheme does it take tensors without a scale as they
    are. The group that is added here matches no module, and tells vLLM nothing.
    """
    weights = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")
    scheme = QuantizationScheme(targets=[NO_EXPERTS], weights=weights)
    quantization["config_groups"]["plain_experts"] = json.loads(scheme.model_dump_json())


def without_linears(quantization: Mapping[str, Any], linears: Collection[str]) -> dict[str, Any]:
    """The configuration by which transformers reads all but these experts' linears, which it finds unquantized."""
    groups = {
        name: {**group, "targets": left}
        for name, group in quantization["config_groups"].items()
        if (left := [target for target in group["targets"] if not _is_of(target, linears)])
    }
    found = {**quantization, "config_groups": groups}
    read_plain_experts(found)
    return found


def schemes_of(quantization: Mapping[str, Any], linears: Iterable[str]) -> dict[str, QuantizationScheme]:
    """The group of each linear that is quantized; ModelError where more than one names it."""
    config = QuantizationConfig.model_validate(quantization)
    groups, ignored = list(config.config_groups.values()), config.ignore or ()
    found: dict[str, QuantizationScheme] = {}
    for linear in linears:
        if any(_is_of(target, (linear,)) for target in ignored):
            continue
        named = [group for group in groups if any(_is_of(target, (linear,)) for target in group.targets)]
        if len(named) > 1:
            raise ModelError(
                f"{len(named)} groups of its quantization_config name {linear}; there must be one"
            )
        named += [group for group in groups if EVERY_LINEAR in group.targets]
        if named:
            group = named[0]
            found[linear] = group.model_copy(update={"format": group.format or config.format})
    return found


def parts_of(scheme: QuantizationScheme) -> set[str]:
    """The last parts of the names of what a linear is stored as.

    MXFP4's codec is NVFP4's and names a global scale, which only NVFP4 has.
    """
    names = set(_codec(scheme).compression_param_names(scheme))
    two_levels = scheme.weights is not None and scheme.weights.strategy == "tensor_group"
    return names if two_levels else names - {"weight_global_scale"}


def is_opened(scheme: QuantizationScheme) -> bool:
    """Whether plain transformers opens experts in a group of this format."""
    return scheme.format is None or str(scheme.format) in OPENED_FORMATS


def unpacked(parts: Mapping[str, Tensor], scheme: QuantizationScheme) -> Tensor:
    """The weight (out, in) of a linear, by the library's codec."""
    weight: Tensor = _codec(scheme).decompress(dict(parts), scheme)["weight"]
    return weight


def _codec(scheme: QuantizationScheme) -> Any:
    return BaseCompressor.get_value_from_registry(str(scheme.format))


def _is_of(target: str, linears: Collection[str]) -> bool:
    """Whether a target is one of some linears, or a pattern that matches one."""
    if not target.startswith(PATTERN):
        return target in linears
    pattern = re.compile(target.removeprefix(PATTERN))
    return any(map(pattern.match, linears))
