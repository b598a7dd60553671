"""Routed experts quantized while they are visited, each on the tokens that the block routes to it.

Some are quantized at a time, where a device does more of one shape at once (device/blocks.py); what each becomes does
not depend on the others.
"""

from collections.abc import Mapping, MutableMapping, Sequence

import torch
from torch import Tensor, nn

from lowbit_quantize.device.blocks import weights_together
from lowbit_quantize.methods.method import InputScale
from lowbit_quantize.model.architecture import Architecture, LinearGroup, kind_of
from lowbit_quantize.model.experts.visited import RoutedCall
from lowbit_quantize.statistics.layer import LayerStatistics
from lowbit_quantize.walk.layer import QuantizedLinear
from lowbit_quantize.walk.module_plan import Modules
from lowbit_quantize.walk.quantize_linears import (
    QuantizedLayer,
    Waiting,
    chains,
    folded_later,
    prepared,
    serve_alike,
)
from lowbit_quantize.walk.visit import ROWS, experts_of


class ExpertQuantizer:
    """Quantizes the experts of one layer by their entries in the table, whatever is around them being done already."""

    def __init__(
        self,
        layer: nn.Module,
        architecture: Architecture,
        modules: Modules,
        groups: Sequence[LinearGroup],
        block: LayerStatistics,
        taken: Mapping[str, InputScale],
        *,
        staged: bool,
        under_calibrated: MutableMapping[int, int],
    ) -> None:
        """`groups` are those of all experts, `block` has seen what all of them read.

        `taken` has, by first linear, scales that experts come with; `staged`: an expert's last linear is quantized on
        what its first ones give when they are. Experts that borrow statistics are noted in `under_calibrated`.
        """
        self._layer, self._architecture, self._modules = layer, architecture, modules
        self._block, self._taken, self._staged = block, taken, staged
        self._under_calibrated = under_calibrated
        self._groups: dict[int, list[LinearGroup]] = {}
        prefix = f"{kind_of(layer).experts}."
        for group in groups:
            number = int(group.linears[0].removeprefix(prefix).partition(".")[0])
            self._groups.setdefault(number, []).append(group)

    @property
    def together(self) -> int:
        """How many it had best be given at a time."""
        pattern = experts_of(self._layer).pattern
        linears = [module for module in pattern.modules() if isinstance(module, nn.Linear)]
        device = next(self._layer.parameters()).device
        return weights_together(device, [(one.out_features, one.in_features) for one in linears])

    def __call__(
        self, numbers: Sequence[int], calibration: RoutedCall
    ) -> dict[int, dict[str, QuantizedLinear]]:
        """Quantize in place these experts, which the layer holds now; linears have their names in the layer."""
        done = {number: QuantizedLayer(taken=dict(self._taken)) for number in numbers}
        with torch.no_grad():
            for stage in self._stages(numbers):
                waiting = {
                    number: self._prepared(number, stage, calibration, done[number]) for number in numbers
                }
                serve_alike(self._layer, [(done[number], states) for number, states in waiting.items()])
        return {number: one.linears for number, one in done.items()}

    def _prepared(
        self, number: int, stage: int | None, calibration: RoutedCall, done: QuantizedLayer
    ) -> list[Waiting]:
        """The linears of an expert that are quantized in a stage, folded and with what they read."""
        groups = self._groups.get(number, [])
        now = [group for group in groups if stage in (None, group.stage)]
        tokens, _ = calibration.of(number)
        later = folded_later(groups, now, self._modules)
        statistics = self._observed([*now, *later], number, tokens, calibration)
        self._under_calibrated.update(statistics.under_calibrated)
        return [
            waiting
            for chain in chains([*now, *later])
            for waiting in prepared(self._layer, chain, later, statistics, self._modules, done, norms={})
        ]

    def _stages(self, numbers: Sequence[int]) -> Sequence[int | None]:
        """The stages of these experts, in order; None where all is done in one."""
        if not self._staged:
            return [None]
        return sorted({group.stage for number in numbers for group in self._groups.get(number, [])})

    def _observed(
        self, groups: Sequence[LinearGroup], number: int, tokens: Tensor, calibration: RoutedCall
    ) -> LayerStatistics:
        """Statistics of an expert as it is now."""
        sampled = {group.linears[0] for group in groups if self._modules[group.linears[0]].samples_inputs}
        statistics = LayerStatistics(
            self._layer, self._architecture, tokens.device, groups, sampled=sampled, block=self._block
        )
        expert, observers = experts_of(self._layer)[number], statistics.observers
        with torch.no_grad():
            for rows in tokens.split(ROWS):
                inputs = calibration.hidden[rows]
                for group in groups:
                    read = inputs if group.enters else expert.middle(inputs)  # type: ignore[operator]
                    observers[group.linears[0]](read)
        return statistics
