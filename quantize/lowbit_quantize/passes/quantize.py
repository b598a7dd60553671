"""The pass that all others are around: the linears that the table names are quantized (walk/stages.py)."""

from typing import Any

from torch import nn

from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.passes.kind import NoOptions, PlainPass
from lowbit_quantize.walk.layer import LayerContext
from lowbit_quantize.walk.stages import StagedLayer


class Quantize(PlainPass):
    """Quantizes a layer by the table of the plan."""

    name = "quantize"
    before_quantize = False

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture

    def run(self, layer: nn.Module, context: LayerContext) -> None:
        StagedLayer(layer, self._architecture, context).quantize()


class QuantizeKind:
    """It has no options: modules have."""

    name = Quantize.name
    options = NoOptions
    after = ()

    def make(self, options: NoOptions, config: Any, architecture: Architecture, model: str) -> Quantize:
        return Quantize(architecture)
