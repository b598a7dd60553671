"""Depth: whole decoder layers go, and the model is one with fewer from then on, in its configuration and in its names.

Which ones go is decided before the walk (depth/choice.py), on the base model alone; the layers that stay walk as those
of any model, and the base's own held-out text goes through all of them (walk/dropped.py).

Attention or a network alone is not dropped: a plain engine's layers have both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from lowbit_core.documents import Section
from lowbit_core.errors import RecipeError
from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.model.resized import OpenModel
from lowbit_quantize.model.shallower import layer_keys
from lowbit_quantize.passes.kind import PlainPass
from lowbit_quantize.walk.layer import LayerContext

NAME = "drop_layers"
Depth = Literal["block-influence", "predicted", "measured", "random"]


class DropLayersOptions(Section):
    """How many layers go, as a share (at least one goes) or a count, or which ones, by their numbers in the base.

    `criterion` says by what they are chosen, on `num_samples` sequences of the calibration text; `seed` is for
    `random`, and for the labels that `predicted` draws. `part`: what of a layer goes.
    """

    ratio: float | None = Field(default=None, gt=0, lt=1, strict=True)
    count: int | None = Field(default=None, ge=1, strict=True)
    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    criterion: Depth = "measured"
    num_samples: int = Field(default=8, ge=1, strict=True)
    seed: int = 0
    part: Literal["layer", "attention", "mlp"] = "layer"

    @model_validator(mode="after")
    def _one_of_three(self) -> "DropLayersOptions":
        if sum(one is not None for one in (self.ratio, self.count, self.layers)) != 1:
            raise ValueError(
                "give ratio, the share of layers that goes, count, how many go, or layers, the numbers of those that go"
            )
        return self


@dataclass(frozen=True)
class DropLayers(PlainPass):
    """Of `depth` layers `count` go; `kept` are the numbers of those that stay, once that is decided."""

    depth: int
    count: int
    recipe: DropLayersOptions
    config: Any
    kept: tuple[int, ...] | None = None

    name = NAME

    def run(self, layer: nn.Module, context: LayerContext) -> None:
        """What walks are the layers that stay: nothing is left to do."""

    def fitted(self, walked: OpenModel, served: OpenModel) -> "DropLayers":
        return self

    @property
    def chosen_by(self) -> str | None:
        """The criterion; None where the recipe names the layers."""
        return None if self.recipe.layers else self.recipe.criterion

    def configuration(self) -> Mapping[str, Any]:
        return {} if self.kept is None else layer_keys(self.config, self.kept)


class DropLayersKind:
    """What a recipe can say, and whether a model has so many layers."""

    name = NAME
    options = DropLayersOptions
    after = ()

    def make(
        self, options: DropLayersOptions, config: Any, architecture: Architecture, model: str
    ) -> DropLayers:
        """Check the counts; raises RecipeError."""
        depth = len(architecture.kinds)
        if options.part != "layer":
            raise RecipeError(
                f"{NAME}.part = {options.part}: vLLM 0.32 makes every layer of {architecture.model_type} with "
                "attention and a network, and its configuration cannot say that one has none; drop whole layers"
            )
        if not architecture.stream.plain:
            raise RecipeError(
                f"{NAME}: layers of {model} ({architecture.model_type}) are called with more than hidden states, which "
                "belongs to their numbers; all must stay; leave the pass out"
            )
        count = options.count or max(1, round(depth * (options.ratio or 0.0)))
        if options.layers is not None:
            wrong = [one for one in options.layers if not 0 <= one < depth]
            if wrong or len(set(options.layers)) < len(options.layers):
                raise RecipeError(
                    f"{NAME}.layers: {model} has layers 0 to {depth - 1}; {wrong[0] if wrong else 'a number twice'} "
                    "is none of them; give each once"
                )
            count = len(options.layers)
        if not 1 <= count < depth:
            raise RecipeError(
                f"{NAME} drops {count} of {depth} layers; allowed are 1 to {depth - 1}: give count, or another ratio"
            )
        return DropLayers(depth, count, options, config, _decided(options, depth, count))


def _decided(options: DropLayersOptions, depth: int, count: int) -> tuple[int, ...] | None:
    """The layers that stay, where nothing has to be measured for that."""
    if options.layers is not None:
        gone = set(options.layers)
    elif options.criterion == "random":
        order = torch.randperm(depth, generator=torch.Generator().manual_seed(options.seed))
        gone = set(order[:count].tolist())
    else:
        return None
    return tuple(number for number in range(depth) if number not in gone)
