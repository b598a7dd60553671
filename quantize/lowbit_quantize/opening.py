"""A base, opened: what is found of it by running it, what it is published in, and what passes make of it.

A pass that resizes is told which model its layers must become before the first of them is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowbit_core.errors import RecipeError
from lowbit_core.log import get_logger
from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.model.discovery.found import open_model
from lowbit_quantize.model.files.published_floats import PublishedFloats, published_floats
from lowbit_quantize.model.reference import ModelReference
from lowbit_quantize.model.resized import OpenModel, resized
from lowbit_quantize.model.shallower import layer_sizes, may_go, shallower
from lowbit_quantize.passes.drop_layers import DropLayers
from lowbit_quantize.recipe import Recipe
from lowbit_quantize.walk.layer import Pass

log = get_logger("quantize")


@dataclass(frozen=True)
class Cut:
    """The base, the model whose layers walk, and the configuration of what is served, where these are not one."""

    base: OpenModel
    walked: OpenModel
    config: Any


def open_base(reference: ModelReference, *, say: bool) -> OpenModel:
    """The model as it was published; raises ModelError where it is none that can be walked.

    `say`: tell what was found of it, the first time.
    """
    base = OpenModel(reference.config, *open_model(reference))
    if say:
        _say_found(reference, base.architecture)
    return base


def cut_by(
    passes: tuple[Pass, ...], base: OpenModel, recipe: Recipe, kept: Sequence[int] | None
) -> tuple[OpenModel, tuple[Pass, ...], Cut | None]:
    """The model that passes make of the base, which resize it or drop layers, and these fitted to it.

    `kept` are the numbers of the layers that stay, where that was measured. Raises RecipeError.
    """
    walked, passes = _without_layers(passes, base, kept)
    resizing = [one for one in passes if one.resizes]
    if walked is base and not resizing:
        return base, passes, None
    if not resizing:
        return walked, passes, Cut(base, walked, walked.config)
    changed = {key: value for one in resizing for key, value in one.configuration().items()}
    served = resized(walked, changed, ", ".join(one.name for one in resizing))
    if recipe.kv_cache.strategy == "attn_head" and "num_key_value_heads" in changed:
        raise RecipeError(
            "kv_cache.strategy = attn_head: the base's heads are not those that stay of them; give strategy: tensor"
        )
    fitted = tuple(one.fitted(walked, served) if one.resizes else one for one in passes)
    return served, fitted, Cut(base, walked, served.config)


def _without_layers(
    passes: tuple[Pass, ...], base: OpenModel, kept: Sequence[int] | None
) -> tuple[OpenModel, tuple[Pass, ...]]:
    """The model that walks, and the passes with what was decided; until then the smallest layers are taken to go."""
    dropping = next((one for one in passes if isinstance(one, DropLayers)), None)
    if dropping is None:
        return base, passes
    decided = dropping.kept if kept is None else tuple(kept)
    if decided is not None:
        dropping = replace(dropping, kept=decided)
        found = shallower(base, decided, dropping.name)
        return found, tuple(dropping if one.name == dropping.name else one for one in passes)
    everything = range(dropping.depth)
    for number in _examples(base):
        shallower(base, [one for one in everything if one != number], dropping.name)
    sizes = layer_sizes(base)
    going = sorted(may_go(base.architecture), key=lambda number: (sizes[number], -number))[: dropping.count]
    return shallower(base, [one for one in everything if one not in going], dropping.name), passes


def _examples(base: OpenModel) -> list[int]:
    """A layer or two of each kind, which stand for what the configuration can say of all: the first and one inside."""
    kinds = base.architecture.kinds
    places = [[n for n, kind in enumerate(kinds) if kind == one] for one in dict.fromkeys(kinds)]
    examples = {number for found in places for number in (found[0], found[len(found) // 2])}
    return sorted(examples.intersection(may_go(base.architecture)))


def _say_found(reference: ModelReference, architecture: Architecture) -> None:
    """What was found by running a twin, where no test of ours has held it against the model; and folds that failed."""
    if not architecture.tested:
        folds = sum(
            group.fold is not None for kind in dict.fromkeys(architecture.kinds) for group in kind.groups
        )
        log.warning(
            "%s (%s) was found by running it, with %d folds, and is not among our tests",
            reference.name,
            architecture.model_type,
            folds,
        )
    for line in dict.fromkeys(line for kind in architecture.kinds for line in kind.dropped):
        log.info("a scale does not fold there: %s", line)


def floats_of(reference: ModelReference) -> PublishedFloats | None:
    """What a base is published in, if not in ordinary floats."""
    quantized = getattr(reference.config, "quantization_config", None)
    if not quantized or reference.kind == "gguf":
        return None
    data = quantized if isinstance(quantized, dict) else quantized.to_dict()
    floats = published_floats(data, reference.name)
    log.info("%s is published in %s and is dequantized while it is read", reference.name, floats.words)
    return floats
