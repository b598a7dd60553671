"""Everything that can be refused before the first expensive second: does this recipe fit this model?"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowbit_core.errors import ModelError, RecipeError
from lowbit_core.log import get_logger
from lowbit_quantize.architectures import Architecture, LinearGroup, architecture_of, linear_of
from lowbit_quantize.expert_pruning import Pruning, plan_pruning
from lowbit_quantize.formats import DEFAULT, check_format
from lowbit_quantize.recipe import KVCache, Recipe
from lowbit_quantize.source import ModelReference, WeightFiles
from lowbit_quantize.stream import build_skeleton

if TYPE_CHECKING:
    from lowbit_quantize.gguf_file import GgufFile

log = get_logger("quantize")

SMALLEST_GROUP = 32  # what the engines' integer kernels divide rows into
FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Plan:
    """A model and a recipe that fit each other.

    `ignored` are names of decoder linears that stay as they are; `unquantized` says in a checkpoint's terms what
    is not quantized.
    """

    reference: ModelReference
    recipe: Recipe
    architecture: Architecture
    skeleton: nn.Module
    ignored: tuple[str, ...]
    unquantized: tuple[str, ...]
    parameters: int
    pruning: Pruning | None = None

    @property
    def paired(self) -> bool:
        """Whether the base model's calibration tokens walk too, so that weights can make up for earlier errors.

        Not where experts are pruned: what that changes is not an error to be made up for.
        """
        return "gptq" in self.recipe.weights.method and not self.pruning

    @property
    def plain_experts(self) -> bool:
        """Whether the model has routed experts and they stay as they are."""
        experts = f".{self.architecture.experts}."
        some_ignored = any(experts in name for name in self.ignored)
        return bool(self.architecture.moe_block) and (self.recipe.weights.method == "none" or some_ignored)


def make_plan(reference: ModelReference, recipe: Recipe) -> Plan:
    """Check that the recipe fits the model; raises ModelError or RecipeError."""
    architecture = architecture_of(reference.model_type, reference.name)
    _refuse_quantized(reference)
    skeleton = skeleton_of(reference, architecture)
    pruning = plan_pruning(reference.config, architecture, recipe.experts, reference.name)
    recipe = _without_latent_scales(recipe, architecture)
    _check_positions(reference, recipe)
    linears = _decoder_linears(skeleton, architecture)
    ignored = _ignored(skeleton, architecture, recipe)
    quantized = {name: linear for name, linear in linears.items() if name not in ignored}
    if recipe.weights.method != "none":
        if not quantized:
            raise RecipeError(
                "weights.ignore leaves no linear to quantize; use weights.method: none for that"
            )
        _check_group_size(quantized, recipe.weights.inputs_per_scale)
        _check_experts(quantized, architecture, recipe)
    else:
        quantized = {}
    check_format(recipe, reference.config, linears, quantized)
    tied = f"{architecture.head}.weight" if reference.config.tie_word_embeddings else ""
    counted = {name: p.numel() for name, p in skeleton.named_parameters() if name != tied}
    return Plan(
        reference=reference,
        recipe=recipe,
        architecture=architecture,
        skeleton=skeleton,
        ignored=ignored,
        unquantized=_unquantized(architecture, recipe, ignored),
        parameters=sum(counted.values()),
        pruning=pruning,
    )


def stored_weights(plan: Plan) -> "WeightFiles | GgufFile":
    """The weights as they were given."""
    if plan.reference.kind == "gguf":
        from lowbit_quantize.gguf_file import GgufFile  # other models do without its imports

        return GgufFile(plan.reference, plan.skeleton)
    return WeightFiles(plan.reference.path)


def check_weights(plan: Plan, weights: "WeightFiles | GgufFile") -> None:
    """Check, from the headers alone, that every weight is there in its shape; raises ModelError.

    A head that is tied may be absent; if it is stored, it must equal the embedding.
    """
    name, head = plan.reference.name, f"{plan.architecture.head}.weight"
    tied = bool(plan.reference.config.tie_word_embeddings)
    for inner, parameter in plan.skeleton.state_dict().items():
        weight = plan.architecture.published_name(inner)
        if weight not in weights:
            if weight == head and tied:
                continue
            raise ModelError(f"{name} lacks the tensor {weight}, which its configuration asks for")
        shape, dtype = weights.shape(weight), weights.dtype(weight)
        if shape != tuple(parameter.shape):
            raise ModelError(
                f"{name}: {weight} has shape {shape}, its configuration asks for {tuple(parameter.shape)}"
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


def skeleton_of(reference: ModelReference, architecture: Architecture) -> nn.Module:
    """The model without weights; raises ModelError where its configuration makes none."""
    if getattr(reference.config, "final_logit_softcapping", None) is not None:
        raise ModelError(
            f"{reference.name} caps its logits (final_logit_softcapping), which is not supported"
        )
    try:
        return build_skeleton(reference.config, architecture)
    except Exception as error:  # whatever a wrong configuration makes of transformers' code
        raise ModelError(
            f"{reference.name}: no model can be built from its configuration: {error!r}"
        ) from error


def _without_latent_scales(recipe: Recipe, architecture: Architecture) -> Recipe:
    """vLLM 0.32 loads no scales for a latent cache; measured with them, a checkpoint would not be what is served."""
    if not architecture.latent_cache or recipe.kv_cache.dtype == "none":
        return recipe
    log.warning("kv_cache.dtype: none instead of fp8, because engines load no scales for a latent cache")
    return recipe.model_copy(update={"kv_cache": KVCache(dtype="none")})


def _check_positions(reference: ModelReference, recipe: Recipe) -> None:
    limit = getattr(reference.config, "max_position_embeddings", None)
    for section, text in (("calibration", recipe.calibration), ("quality", recipe.quality)):
        if limit and not text.token_ids and text.sequence_tokens > limit:
            raise RecipeError(
                f"{section}.sequence_tokens = {text.sequence_tokens} is more than the {limit} positions of the model"
            )


def _decoder_groups(
    skeleton: nn.Module, architecture: Architecture
) -> Iterator[tuple[str, tuple[LinearGroup, ...]]]:
    """Each decoder layer's name and its groups."""
    layers: Any = skeleton.get_submodule(architecture.layers)
    for index, layer in enumerate(layers):
        yield f"{architecture.layers}.{index}", architecture.groups_of(layer)


def _decoder_linears(skeleton: nn.Module, architecture: Architecture) -> dict[str, nn.Linear]:
    names = [
        f"{layer}.{linear}"
        for layer, groups in _decoder_groups(skeleton, architecture)
        for group in groups
        for linear in group.linears
    ]
    return {name: linear_of(skeleton, name) for name in names}


def _check_experts(linears: dict[str, nn.Linear], architecture: Architecture, recipe: Recipe) -> None:
    expert = next(
        (name for name in linears if architecture.moe_block and f".{architecture.experts}." in name), None
    )
    if expert and not recipe.weights.symmetric:
        raise RecipeError(
            f"weights.symmetric = false: engines run quantized experts ({expert}) on symmetric grids only; "
            "set it to true, or leave experts as they are with weights.ignore: ['re:.*[.]experts[.].*']"
        )


def _ignored(skeleton: nn.Module, architecture: Architecture, recipe: Recipe) -> tuple[str, ...]:
    """Decoder linears that stay as they are: those that a pattern names and all that engines fuse with them.

    Engines make one matrix of a group, and one of all the experts of a layer.
    """
    patterns = recipe.weights.ignore
    linears = list(_decoder_linears(skeleton, architecture))
    known = {
        architecture.published_name(name)
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear)
    }
    for pattern in patterns:
        if not any(_matches(pattern, name) for name in known):
            raise RecipeError(
                f"weights.ignore: {pattern!r} matches no linear; names look like "
                f"{architecture.published_name(linears[-1])}, patterns like 're:.*down_proj'"
            )
    named = {
        name for name in linears if any(_matches(p, architecture.published_name(name)) for p in patterns)
    }
    for layer, groups in _decoder_groups(skeleton, architecture):
        fused = [[f"{layer}.{linear}" for linear in group.linears] for group in groups]
        experts = f"{layer}.{architecture.experts}."
        fused.append([name for names in fused for name in names if name.startswith(experts)])
        for names in fused:
            named.update(names if named.intersection(names) else ())
    return tuple(sorted(named))


def _unquantized(architecture: Architecture, recipe: Recipe, ignored: tuple[str, ...]) -> tuple[str, ...]:
    """How a checkpoint says what is not quantized: the head, routers, gates and the ignored, by pattern if it can."""
    gates = {
        architecture.published_name(f".{name}") for group in architecture.groups for name in group.beside
    }
    names = [architecture.published_name(name) for name in ignored]
    patterns = [pattern for pattern in recipe.weights.ignore if pattern.startswith("re:")]
    covered = recipe.format == DEFAULT and all(
        any(_matches(pattern, name) for pattern in patterns) for name in names
    )
    return (
        architecture.head,
        *(f"re:.*{re.escape(gate)}$" for gate in sorted(gates)),
        *(patterns if covered else names),
    )


def _matches(pattern: str, name: str) -> bool:
    if not pattern.startswith("re:"):
        return pattern == name
    try:
        return re.fullmatch(pattern.removeprefix("re:"), name) is not None
    except re.error as error:
        raise RecipeError(f"weights.ignore: {pattern!r} is not a regular expression: {error}") from error


def _check_group_size(linears: dict[str, nn.Linear], group_size: int | None) -> None:
    for name, linear in linears.items():
        if linear.in_features % (group_size or SMALLEST_GROUP) == 0:
            continue
        inputs = f"the {linear.in_features} inputs of {name}"
        if group_size is None:
            raise RecipeError(f"{inputs} are no multiple of {SMALLEST_GROUP}; name it in weights.ignore")
        widths = {other.in_features for other in linears.values()}
        fitting = [str(size) for size in (32, 64, 128) if all(width % size == 0 for width in widths)]
        allowed = f"allowed here: {', '.join(fitting)}" if fitting else "32, 64 and 128 do not fit either"
        raise RecipeError(f"weights.group_size = {group_size} does not divide {inputs}; {allowed}")
