"""What TensorRT-LLM makes of a compressed-tensors checkpoint that it is given as it is.

Its rules, from `tensorrt_llm/models/quant_config_utils.py` (1.4 release candidates, November 2026), not run: no GPU
was there. They look at bits, strategies and group sizes and, of 8 bits, not at whether numbers are integers.
"""

from collections.abc import Mapping
from typing import Any

REGEX = "re:"


def tensorrt_llm_reads(quantization: Mapping[str, Any]) -> tuple[str | None, str]:
    """Its algorithm for a `quantization_config`, or None, and why not; never one that would compute other numbers."""
    groups = list((quantization.get("config_groups") or {}).values())
    if not groups:
        return None, "it has no config_groups"
    cache = quantization.get("kv_cache_scheme")
    if cache is not None and (cache.get("num_bits"), cache.get("type")) != (8, "float"):
        return None, "its KV cache is not FP8"
    if cache is not None and cache.get("strategy") != "tensor":
        return None, "it takes one scale of an FP8 cache a layer, not one a head"
    found = [_algorithm(group, group.get("format", quantization.get("format"))) for group in groups]
    if wrong := next((reason for algorithm, reason in found if algorithm is None), None):
        return None, wrong
    if len(groups) == 1:
        return found[0]
    plain = [name for group in groups for name in group.get("targets") or () if not name.startswith(REGEX)]
    if classes := [name for name in plain if "." not in name]:
        return None, f"of several groups it takes names of modules, not of classes such as {classes[0]}"
    return "MIXED_PRECISION", ""


def _algorithm(group: Mapping[str, Any], form: str | None) -> tuple[str | None, str]:
    weights, inputs = group["weights"], group.get("input_activations")
    bits, kind, strategy = weights["num_bits"], weights.get("type"), weights.get("strategy")
    if bits == 4 and kind == "float" and strategy == "group" and inputs is None:
        fits = weights.get("group_size") == 32
        return ("W4A16_MXFP4", "") if fits else (None, "it takes MXFP4 in groups of 32 only")
    if inputs is None:
        return None, f"it takes no {bits}-bit weights whose inputs are not rounded"
    pair = (strategy, inputs.get("strategy"))
    if bits == 8 and kind != "float":
        return None, "it would read 8-bit integers as FP8, and compute other numbers"
    if bits == 8 and pair == ("channel", "token"):
        return "FP8_PER_CHANNEL_PER_TOKEN", ""
    if bits == 8 and pair == ("block", "group") and inputs.get("group_size") == 128:
        return "FP8_BLOCK_SCALES", ""
    if (bits, kind, *pair) == (4, "float", "tensor_group", "tensor_group") and weights.get(
        "group_size"
    ) == 16:
        return "NVFP4", ""
    return None, f"it takes no {bits}-bit weights by {strategy} with inputs by {inputs.get('strategy')}"
