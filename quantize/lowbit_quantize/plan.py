"""Everything that can be refused before the first expensive second: does this recipe fit this model?"""

import re
from dataclasses import dataclass

import torch
from torch import nn

from lowbit_core.errors import ModelError, RecipeError
from lowbit_quantize.architectures import Architecture, architecture_of
from lowbit_quantize.recipe import Recipe
from lowbit_quantize.source import ModelReference, WeightFiles
from lowbit_quantize.stream import build_skeleton

DISK_MARGIN_BYTES = 64 << 20
BASE_BYTES_PER_PARAMETER = 2
FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Plan:
    """A model and a recipe that fit each other. `ignored` are full names of linears that stay as they are."""

    reference: ModelReference
    recipe: Recipe
    architecture: Architecture
    skeleton: nn.Module
    ignored: tuple[str, ...]
    parameters: int
    linear_parameters: int

    @property
    def disk_bytes(self) -> int:
        """Bytes that a run needs at its peak: the result and, for GGUF, the unpacked base beside it."""
        bits = self.recipe.weights.bits + 0.75 if self.recipe.weights.method != "none" else 16
        result = (self.parameters - self.linear_parameters) * BASE_BYTES_PER_PARAMETER
        result += int(self.linear_parameters * bits / 8)
        unpacked = self.parameters * BASE_BYTES_PER_PARAMETER if self.reference.kind == "gguf" else 0
        return result + unpacked + DISK_MARGIN_BYTES


def make_plan(reference: ModelReference, recipe: Recipe) -> Plan:
    """Check that the recipe fits the model; raises ModelError or RecipeError."""
    architecture = architecture_of(reference.model_type, reference.name)
    _refuse_quantized(reference)
    skeleton = _skeleton_of(reference)
    _check_positions(reference, recipe)
    linears = _decoder_linears(skeleton, architecture)
    ignored = _ignored(skeleton, architecture, recipe)
    quantized = {name: linear for name, linear in linears.items() if name not in ignored}
    if recipe.weights.method != "none":
        if not quantized:
            raise RecipeError(
                "weights.ignore leaves no linear to quantize; use weights.method: none for that"
            )
        _check_group_size(quantized, recipe.weights.group_size)
    else:
        quantized = {}
    counted = {id(p): p.numel() for p in skeleton.parameters()}
    return Plan(
        reference=reference,
        recipe=recipe,
        architecture=architecture,
        skeleton=skeleton,
        ignored=ignored,
        parameters=sum(counted.values()),
        linear_parameters=sum(linear.weight.numel() for linear in quantized.values()),
    )


def check_weights(plan: Plan, weights: WeightFiles) -> None:
    """Check, from the headers alone, that every weight is there in its shape; raises ModelError.

    A head that is tied may be absent; if it is stored, it must equal the embedding.
    """
    name, head = plan.reference.name, f"{plan.architecture.head}.weight"
    tied = bool(plan.reference.config.tie_word_embeddings)
    for weight, parameter in plan.skeleton.state_dict().items():
        if weight not in weights:
            if weight == head and tied:
                continue
            raise ModelError(f"{name} lacks the tensor {weight}, which its config.json asks for")
        shape, dtype = weights.shape(weight), weights.dtype(weight)
        if shape != tuple(parameter.shape):
            raise ModelError(
                f"{name}: {weight} has shape {shape}, its config.json asks for {tuple(parameter.shape)}"
            )
        if dtype not in FLOATS:
            raise ModelError(
                f"{name}: {weight} is stored as {dtype}; give the unquantized model ({', '.join(FLOATS)})"
            )
    embedding = f"{plan.architecture.embedding}.weight"
    if tied and head in weights and not torch.equal(weights.read(head), weights.read(embedding)):
        raise ModelError(
            f"{name} says that its embeddings are tied and stores another {head}; set one of them right"
        )


def _refuse_quantized(reference: ModelReference) -> None:
    quantized = getattr(reference.config, "quantization_config", None)
    if quantized and reference.kind != "gguf":
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized
        raise ModelError(f"{reference.name} is already quantized ({method}); give the unquantized model")


def _skeleton_of(reference: ModelReference) -> nn.Module:
    try:
        return build_skeleton(reference.config)
    except Exception as error:  # whatever a wrong configuration makes of transformers' code
        raise ModelError(
            f"{reference.name}: no model can be built from its configuration: {error!r}"
        ) from error


def _check_positions(reference: ModelReference, recipe: Recipe) -> None:
    limit = getattr(reference.config, "max_position_embeddings", None)
    for section, text in (("calibration", recipe.calibration), ("quality", recipe.quality)):
        if limit and not text.token_ids and text.sequence_tokens > limit:
            raise RecipeError(
                f"{section}.sequence_tokens = {text.sequence_tokens} is more than the {limit} positions of the model"
            )


def _decoder_linears(skeleton: nn.Module, architecture: Architecture) -> dict[str, nn.Linear]:
    names = {linear for group in architecture.groups for linear in group.linears}
    found = {}
    for name, module in skeleton.named_modules():
        within = name.removeprefix(f"{architecture.layers}.").partition(".")[2]
        if isinstance(module, nn.Linear) and name.startswith(architecture.layers) and within in names:
            found[name] = module
    return found


def _ignored(skeleton: nn.Module, architecture: Architecture, recipe: Recipe) -> tuple[str, ...]:
    """Linears that a pattern names, and those that share a group with one: engines fuse a group into one matrix."""
    patterns = recipe.weights.ignore
    layer = re.compile(rf"({re.escape(architecture.layers)}\.\d+)\.(.+)")
    ignored = set()
    unmatched = set(patterns) - {architecture.head}
    for name, module in skeleton.named_modules():
        matching = {pattern for pattern in patterns if _matches(pattern, name)}
        if isinstance(module, nn.Linear) and matching:
            ignored.add(name)
            unmatched -= matching
            match = layer.fullmatch(name)
            group = match and next((g for g in architecture.groups if match[2] in g.linears), None)
            ignored.update(f"{match[1]}.{linear}" for linear in group.linears) if match and group else None
    if unmatched:
        raise RecipeError(
            f"weights.ignore: {sorted(unmatched)[0]!r} matches no linear; names look like "
            f"{architecture.layers}.0.{architecture.groups[-1].linears[0]}, patterns like 're:.*down_proj'"
        )
    return tuple(sorted(ignored | {architecture.head}))


def _matches(pattern: str, name: str) -> bool:
    if not pattern.startswith("re:"):
        return pattern == name
    try:
        return re.fullmatch(pattern.removeprefix("re:"), name) is not None
    except re.error as error:
        raise RecipeError(f"weights.ignore: {pattern!r} is not a regular expression: {error}") from error


def _check_group_size(linears: dict[str, nn.Linear], group_size: int) -> None:
    for name, linear in linears.items():
        if linear.in_features % group_size:
            widths = {other.in_features for other in linears.values()}
            fitting = [str(size) for size in (32, 64, 128) if all(width % size == 0 for width in widths)]
            allowed = f"allowed here: {', '.join(fitting)}" if fitting else "32, 64 and 128 do not fit either"
            inputs = f"the {linear.in_features} inputs of {name}"
            raise RecipeError(f"weights.group_size = {group_size} does not divide {inputs}; {allowed}")
