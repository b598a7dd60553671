"""A pass of one file: the experts that pruning leaves are scaled so that their layer comes nearest to the base's."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from lowbit_core.documents import Section
from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.passes.kind import PlainPass
from lowbit_quantize.walk.layer import LayerContext
from lowbit_quantize.walk.visit import experts_of


class RescaleOptions(Section):
    """The factor lies between 1 / most and most."""

    most: float = Field(default=2.0, gt=1)


class RescaleExperts(PlainPass):
    """What experts give is linear in the factor of their last linears: the best one is a quotient."""

    name = "rescale_experts"

    def __init__(self, architecture: Architecture, most: float) -> None:
        self._architecture, self._most = architecture, most

    def run(self, layer: nn.Module, context: LayerContext) -> None:
        if context.result.kept_experts is None:
            return
        factor = [1.0]

        def scale(_: int, expert: Any) -> None:
            weight = expert.down_proj.weight
            expert.down_proj.weight = nn.Parameter(weight * factor[0], requires_grad=False)

        experts = experts_of(layer)
        experts.change(scale)

        def output(value: float) -> Tensor:
            factor[0] = value
            experts.let_go()
            return torch.cat(
                list(context.decoder.run_layer(layer, context.index, context.calibration))
            ).float()

        without = output(0.0)
        experts_give, wanted = output(1.0) - without, context.base_output().float() - without
        best = float((experts_give * wanted).sum() / experts_give.square().sum().clamp(min=1e-20))
        factor[0] = min(max(best, 1 / self._most), self._most)
        experts.let_go()


class RescaleExpertsKind:
    """It stands between pruning and quantizing."""

    name = RescaleExperts.name
    options = RescaleOptions
    after = ("prune_experts",)

    def make(
        self, options: RescaleOptions, config: Any, architecture: Architecture, model: str
    ) -> RescaleExperts:
        return RescaleExperts(architecture, options.most)
