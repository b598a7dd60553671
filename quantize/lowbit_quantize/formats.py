"""How a checkpoint stores its quantized linears: one table, and what fits into which.

Codes and scales are the same in every format. AutoAWQ's and AutoGPTQ's are for engines and tools that read
nothing newer; they have no place for the scales of an FP8 cache, which therefore runs with scales of 1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lowbit_core.errors import RecipeError
from lowbit_quantize import export, format_autoawq, format_autogptq
from lowbit_quantize.grid import Rounded
from lowbit_quantize.recipe import Recipe

DEFAULT = "compressed-tensors"
INSTEAD = f"use format: {DEFAULT}"
KERNEL_GROUP_SIZES = (32, 64, 128)  # what vLLM's GPU code takes in the older formats
OUTPUT_MULTIPLE = 32  # AutoAWQ, AutoGPTQ and vLLM's CPU kernel count outputs in blocks of 32


@dataclass(frozen=True)
class Format:
    """How linears are packed, what config.json says of them, and what the format can hold.

    `tool_file` is a second file with the same configuration, for the tool that reads no other.
    """

    pack: Callable[[Rounded], dict[str, Tensor]]
    configuration: Callable[[Recipe, list[str]], dict[str, Any] | None]
    bits: tuple[int, ...]
    carries_kv_scales: bool
    asymmetric: bool
    layers_may_differ: bool
    tool_file: str | None = None


FORMATS = {
    DEFAULT: Format(
        pack=export.pack,
        configuration=export.quantization_config,
        bits=(4, 8),
        carries_kv_scales=True,
        asymmetric=True,
        layers_may_differ=True,
    ),
    "autoawq": Format(
        pack=format_autoawq.pack,
        configuration=format_autoawq.configuration,
        bits=(4,),
        carries_kv_scales=False,
        asymmetric=True,
        layers_may_differ=True,
    ),
    "autogptq": Format(
        pack=format_autogptq.pack,
        configuration=format_autogptq.configuration,
        bits=(4, 8),
        carries_kv_scales=False,
        asymmetric=False,
        layers_may_differ=False,
        tool_file="quantize_config.json",
    ),
}


def check_format(
    recipe: Recipe, config: Any, linears: Mapping[str, nn.Linear], quantized: Mapping[str, nn.Linear]
) -> None:
    """Raise RecipeError where no engine would read this recipe's linears in its format.

    `linears` are all linears of the decoder by full name, `quantized` those that the recipe does not leave out.
    """
    if recipe.format == DEFAULT:
        return
    if getattr(config, "num_experts", None):
        raise RecipeError(f"format: {recipe.format} is for dense models and this one has experts; {INSTEAD}")
    _check_grid(recipe)
    left = sorted(linears.keys() - quantized.keys())
    if left and not FORMATS[recipe.format].layers_may_differ:
        raise RecipeError(
            f"weights.ignore leaves {left[0]} as it is, which format: {recipe.format} cannot say; {INSTEAD}"
        )
    for name, linear in quantized.items():
        if linear.out_features % OUTPUT_MULTIPLE:
            raise RecipeError(
                f"format: {recipe.format} packs outputs in blocks of {OUTPUT_MULTIPLE} and {name} has "
                f"{linear.out_features}; {INSTEAD}"
            )


def _check_grid(recipe: Recipe) -> None:
    weights, chosen = recipe.weights, FORMATS[recipe.format]
    if weights.method == "none":
        raise RecipeError(
            f"weights.method = none: format: {recipe.format} holds quantized linears only; {INSTEAD}"
        )
    if weights.bits not in chosen.bits:
        allowed = " or ".join(map(str, chosen.bits))
        raise RecipeError(
            f"weights.bits = {weights.bits}: format: {recipe.format} holds {allowed} bits; {INSTEAD}"
        )
    if not weights.symmetric and not chosen.asymmetric:
        raise RecipeError(
            f"weights.symmetric = false: vLLM refuses asymmetric linears in format: {recipe.format}; "
            f"set it to true, or {INSTEAD}"
        )
    if weights.group_size not in KERNEL_GROUP_SIZES:
        allowed = ", ".join(map(str, KERNEL_GROUP_SIZES))
        raise RecipeError(
            f"weights.group_size = {weights.group_size}: vLLM reads format: {recipe.format} in groups of "
            f"{allowed} only; {INSTEAD}"
        )
