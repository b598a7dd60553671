"""A pass of one file that changes nothing: how far each quantized layer's output is from the base model's."""

from typing import Any

import torch
from torch import nn

from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.passes.kind import NoOptions, PlainPass
from lowbit_quantize.walk.layer import LayerContext


class MeasureLayers(PlainPass):
    """Relative squared error by layer, as a figure of the manifest."""

    name = "measure_layers"
    before_quantize = False

    def run(self, layer: nn.Module, context: LayerContext) -> None:
        given = torch.cat(list(context.decoder.run_layer(layer, context.index, context.calibration))).float()
        wanted = context.base_output().float()
        context.result.figures["error"] = float((given - wanted).square().sum() / wanted.square().sum())


class MeasureLayersKind:
    """It has no options."""

    name = MeasureLayers.name
    options = NoOptions
    after = ("quantize",)

    def make(self, options: NoOptions, config: Any, architecture: Architecture, model: str) -> MeasureLayers:
        return MeasureLayers()
