"""What of a table no engine or reader takes: refused in one line, from shapes and names alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lowbit_core.errors import RecipeError
from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.model.experts.linears import ExpertList
from lowbit_quantize.model.files.published_names import PublishedNames
from lowbit_quantize.model.skeleton import text_config
from lowbit_quantize.recipe import Recipe
from lowbit_quantize.walk.module_plan import ModulePlan

OF_WHOLE_TENSORS = ("nvfp4-pack-quantized",)  # formats with a scale that all of a tensor shares


def check_experts(
    modules: Mapping[str, ModulePlan],
    linears: Mapping[str, nn.Linear],
    architecture: Architecture,
    published: Mapping[str, str],
) -> None:
    """All layers' routed experts share one entry, because transformers opens no other, that engines run."""
    if not architecture.moe_block:
        return
    experts = [name for name in linears if architecture.in_experts(name)]
    entries = dict.fromkeys(modules.get(name) for name in experts)
    if len(entries) > 1:
        other = next(name for name in experts if modules.get(name) != modules.get(experts[0]))
        raise RecipeError(
            f"modules: {published[experts[0]]} and {published[other]} differ, and transformers reads the experts of "
            "all layers by one scheme; give one rule for all of them: {match: '*.experts.*', …}"
        )
    entry = next(iter(entries), None)
    misfit = None if entry is None else entry.scheme.experts.misfit
    if entry is not None and misfit is not None:
        raise RecipeError(
            f"modules: {entry.scheme.name} does not fit routed experts ({published[experts[0]]}): {misfit}; give them "
            "W4A16, W8A8, FP8_DYNAMIC or NVFP4, or leave them as they are: {match: '*.experts.*', scheme: none}"
        )


def check_opened(modules: Mapping[str, ModulePlan], names: PublishedNames, skeleton: nn.Module) -> None:
    """Quantized experts are single ones, and transformers must be able to put them together again."""
    if not modules and any(isinstance(one, ExpertList) and one.written_single for one in skeleton.modules()):
        raise RecipeError(
            "modules: transformers reads this model's experts one by one from a quantized checkpoint and in stacks "
            "from any other, so that one in which nothing is quantized would not open; name some linears"
        )
    closed = next((name for name in modules if name in names.closed), None)
    if closed is not None:
        raise RecipeError(
            f"modules: {names.published(closed)} is an expert of a family that transformers opens in stacks only, so "
            "that no reader proves what was written; leave experts as they are: {match: '*.experts.*', scheme: none}"
        )


def check_width(name: str, inputs: int, entry: ModulePlan, linears: Any, *, fixed_size: bool) -> None:
    """A linear's inputs must fill its pattern of zeros and whole groups, of which a `fixed_size` has no others."""
    _check_pattern(name, inputs, entry)
    reason = entry.scheme.misfit(inputs)
    if reason is None:
        return
    if fixed_size:
        raise RecipeError(
            f"modules: {entry.scheme.name} does not fit the {inputs} inputs of {name}: {reason}; give a rule for "
            "it with another scheme (FP8_DYNAMIC), or leave it as it is with scheme: none"
        )
    widths = {linear.in_features for linear in linears}
    fitting = [str(size) for size in (32, 64, 128) if all(width % size == 0 for width in widths)]
    hint = (
        f"group sizes that fit all linears: {', '.join(fitting)}"
        if fitting
        else "32, 64 and 128 do not fit all either"
    )
    raise RecipeError(
        f"modules: {entry.scheme.name} does not fit the {inputs} inputs of {name}: {reason}; {hint}, "
        "or leave it as it is with scheme: none"
    )


def _check_pattern(name: str, inputs: int, entry: ModulePlan) -> None:
    """A linear's inputs must fill whole groups of a pattern of zeros."""
    pruner = entry.pruner
    reason = pruner.sparsity.misfit(inputs) if pruner else None
    if pruner is not None and reason is not None:
        raise RecipeError(
            f"modules: {pruner.name} with sparsity {pruner.sparsity} does not fit the {inputs} inputs of {name}: "
            f"{reason}; give a ratio, such as sparsity: {pruner.sparsity.zeros:g}, or a rule for it without "
            f"{pruner.name}"
        )


def check_outputs(names: Sequence[str], outputs: Sequence[int], entry: ModulePlan) -> None:
    """Linears that engines make one matrix of must fit each other."""
    reason = entry.scheme.outputs_misfit(outputs, split=False)
    if reason is not None:
        raise RecipeError(
            f"modules: {entry.scheme.name} does not fit {names[0]}, which engines make one matrix of with "
            f"{', '.join(name.rpartition('.')[2] for name in names[1:])}: {reason}; give a rule for them with another "
            "scheme (FP8_DYNAMIC), or leave them as they are with scheme: none"
        )


def check_words(name: str, words: int, entry: ModulePlan | None) -> None:
    """What the head reads is not rounded, and vLLM cuts its packed zero points by whole words of 32 bits."""
    if entry is not None and entry.scheme.input_quantizer is not None:
        raise RecipeError(
            f"modules: {entry.scheme.name} rounds what {name} reads, which quality is not measured with; give a scheme "
            "of weights only (W4A16, W8A16), or leave it as it is"
        )
    if entry is not None and entry.scheme.format in OF_WHOLE_TENSORS:
        raise RecipeError(
            f"modules: {entry.scheme.name} has one scale for all of {name}, which is quantized some rows at a time; "
            "give W4A16, W8A16 or MXFP4A16, or leave it as it is"
        )
    if entry is None or entry.scheme.symmetric or words * entry.scheme.bits % 32 == 0:
        return
    raise RecipeError(
        f"modules: {entry.scheme.name} does not fit the {words} outputs of {name}: engines read zero points of "
        f"{32 / entry.scheme.bits:g} outputs at a time; give a symmetric scheme, or leave it as it is"
    )


def check_positions(name: str, config: Any, recipe: Recipe) -> None:
    """Raise RecipeError where sequences are longer than what the model of this name has positions for."""
    limit = getattr(text_config(config), "max_position_embeddings", None)
    for section, text in (("calibration", recipe.calibration), ("quality", recipe.quality)):
        if limit and not text.token_ids and text.max_seq_length > limit:
            raise RecipeError(
                f"{section}.max_seq_length = {text.max_seq_length}: {name} has {limit} positions"
            )
