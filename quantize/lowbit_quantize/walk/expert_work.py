"""Routed experts quantized one at a time, while they are visited: on the tokens that the block routes to each."""

from collections.abc import Mapping, MutableMapping, Sequence

import torch
from torch import Tensor, nn

from lowbit_quantize.methods.method import InputScale
from lowbit_quantize.model.architecture import Architecture, LinearGroup, kind_of
from lowbit_quantize.model.visited_experts import RoutedCall
from lowbit_quantize.statistics.layer import LayerStatistics
from lowbit_quantize.walk.layer import QuantizedLinear
from lowbit_quantize.walk.module_plan import Modules
from lowbit_quantize.walk.quantize_linears import QuantizedLayer, folded_later, quantize_linears
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

    def __call__(self, number: int, calibration: RoutedCall) -> dict[str, QuantizedLinear]:
        """Quantize in place the expert that the layer holds now; the linears by their names in the layer."""
        groups, done = self._groups.get(number, []), QuantizedLayer(taken=dict(self._taken))
        tokens, _ = calibration.of(number)
        for stage in self._stages(groups):
            statistics = self._observed(
                [*stage, *folded_later(groups, stage, self._modules)], number, tokens, calibration
            )
            self._under_calibrated.update(statistics.under_calibrated)
            with torch.no_grad():
                quantize_linears(
                    self._layer, self._architecture, statistics, self._modules, stage, done, groups, norms={}
                )
        return done.linears

    def _stages(self, groups: list[LinearGroup]) -> list[list[LinearGroup]]:
        if not self._staged:
            return [groups] if groups else []
        numbers = sorted({group.stage for group in groups})
        return [[group for group in groups if group.stage == number] for number in numbers]

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
                    read = inputs if group.other_readers else expert.middle(inputs)  # type: ignore[operator]
                    observers[group.linears[0]](read)
        return statistics
