"""Linears that plain transformers does not open, or opens without rounding what they read, and all the others.

transformers (5.19) stacks a layer's experts and unpacks them itself, from FP8 by channel and packed integers only; int8
experts (`int-quantized`) and those in blocks of floats (`nvfp4-pack-quantized`, `mxfp4-pack-quantized`,
`mxfp8-quantized`) end in an error, and so do integers that lie across words, anywhere. Another reader unpacks such a
linear (`schemes/storage/stored_linears.py`), and the rest of the checkpoint is transformers' under a configuration that
says these linears are not quantized.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lowbit_core.errors import ModelError
from lowbit_quantize.device.memory import without_compiler

with without_compiler():  # the library compiles a function for 4-bit floats, which is not called here
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

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


def without_linears(quantization: Mapping[str, Any], linears: Collection[str]) -> dict[str, Any] | None:
    """The configuration by which transformers reads all but these linears, which it finds unquantized.

    None where nothing else is quantized.
    """
    groups = {
        name: {**group, "targets": left}
        for name, group in quantization["config_groups"].items()
        if (left := [target for target in group["targets"] if not _is_of(target, linears)])
    }
    if not groups:
        return None
    ignore = list(quantization.get("ignore") or ())
    if any(EVERY_LINEAR in group["targets"] for group in groups.values()):  # other tools' files
        ignore += [name for name in linears if name not in ignore]
    found = {**quantization, "config_groups": groups, "ignore": ignore}
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


def _is_of(target: str, linears: Collection[str]) -> bool:
    """Whether a target is one of some linears, or a pattern that matches one."""
    if not target.startswith(PATTERN):
        return target in linears
    pattern = re.compile(target.removeprefix(PATTERN))
    return any(map(pattern.match, linears))
