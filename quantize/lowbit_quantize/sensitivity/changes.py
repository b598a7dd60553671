"""What a candidate changes of a group's outputs, if that group alone is quantized: the real error of its methods.

Rows of a weight do not meet in any method, and what rounding does to one has nothing to do with what it does to
another. So some rows stand for all of a large weight: each is taken with a probability π that grows with its size and
with the gradient of its output, and its part of g · δ counts 1 / √π (Horvitz and Thompson 1952, of the sum of squares).
What rounds inputs changes all outputs together; its part is computed whole, by the gradient of the inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lowbit_quantize.device.factors import divided
from lowbit_quantize.methods.method import InputScale, Site, SitePart
from lowbit_quantize.model.architecture import LinearGroup, linear_of
from lowbit_quantize.model.experts.visited import RoutedCall
from lowbit_quantize.model.folds import tied
from lowbit_quantize.schemes.inputs import InputQuantizer
from lowbit_quantize.sensitivity.gradients import STORED, Seen
from lowbit_quantize.statistics.layer import LayerStatistics
from lowbit_quantize.walk.module_plan import ModulePlan
from lowbit_quantize.walk.visit import ROWS

SAMPLED_ROWS = 256  # of a group's stacked weight
EVENLY = 0.1  # of the probability that is the same for all rows: none is so rare that it decides alone


@dataclass(frozen=True)
class Change:
    """The difference of some rows of a weight, (rows, in), and how what it reads is rounded, where engines do.

    Inputs are divided by `scale`, (in,), before they are rounded.
    """

    difference: Tensor
    quantizer: InputQuantizer | None = None
    scale: Tensor | None = None
    input_scale: float | None = None

    def of_inputs(self, inputs: Tensor) -> Tensor:
        """What rounding adds to inputs, (tokens, in)."""
        assert self.quantizer is not None
        wide = inputs.float()
        if self.scale is None:
            return self.quantizer.round(wide.clone(), self.input_scale) - wide
        return self.quantizer.round(wide / self.scale, self.input_scale) * self.scale - wide


class FeltGroup:
    """What the linears of one group read and gave, and the rows of their stacked weight that stand for all."""

    def __init__(
        self,
        layer: nn.Module,
        group: LinearGroup,
        seen: Sequence[Sequence[Seen]],
        generator: torch.Generator,
        rows: int = SAMPLED_ROWS,
    ) -> None:
        """`seen` has what each linear saw, batch by batch; they are given the same inputs."""
        self.group = group
        self._weight = torch.cat([linear_of(layer, name).weight for name in group.linears])
        self._seen = [
            Seen(batch[0].inputs, torch.cat([one.gradient for one in batch], -1), batch[0].tokens)
            for batch in zip(*seen, strict=True)
        ]
        power = torch.stack([one.gradient.float().square().sum(0) for one in self._seen]).sum(0)
        self._rows, chance = drawn(power * self._weight.float().square().sum(1), rows, generator)
        self._factor = chance.rsqrt()
        self._input_gradients: list[Tensor] | None = None

    def change(self, entry: ModulePlan, statistics: LayerStatistics) -> Change:
        """Quantize the rows by the entry's methods.

        A scale of the inputs is taken where it folds into what comes before; how folding changes that is left out.
        """
        weight = self._weight[self._rows].float()
        hessian, sample = statistics.hessian(self.group), statistics.sample(self.group)
        inputs = None if sample is None else sample.rows()
        scale = _input_scale(self.group, entry, weight, hessian, inputs)
        if scale is not None:
            weight, hessian = weight * scale, divided(hessian, scale)
        served = entry.quantized(weight, hessian).dequantize()
        difference = served - weight if scale is None else (served - weight) / scale
        quantizer, input_scale = entry.scheme.input_quantizer, None
        if quantizer is not None and quantizer.static and sample is not None and inputs is not None:
            divisor = torch.ones_like(sample.absmax) if scale is None else scale
            input_scale = quantizer.calibrated(sample.absmax / divisor, inputs / divisor)
        return Change(difference.to(STORED), quantizer, scale, input_scale)

    def scores(self, change: Change, tokens: int) -> Tensor:
        """g · δ of each token of the text, (tokens,): to first order the change of its loss."""
        total = torch.zeros(tokens, device=change.difference.device)
        start = 0
        for place, one in enumerate(self._seen):
            gradient = one.gradient[:, self._rows].float() * self._factor
            found = (linear(one.inputs.to(STORED), change.difference).float() * gradient).sum(-1)
            if change.quantizer is not None:
                found += (change.of_inputs(one.inputs) * self._by_inputs[place].float()).sum(-1)
            if one.tokens is None:
                total[start : start + len(found)] += found
                start += len(found)
            else:
                total.index_add_(0, one.tokens, found)
        return total

    @property
    def _by_inputs(self) -> list[Tensor]:
        """The gradients by what the group reads, through its own linears, batch by batch."""
        if self._input_gradients is None:
            turned = self._weight.T.to(STORED)
            self._input_gradients = [linear(one.gradient, turned) for one in self._seen]
        return self._input_gradients


def drawn(sizes: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Places of about `count` rows, drawn by their `sizes`, (rows,), and the probability of each of these."""
    if len(sizes) <= count:
        return torch.arange(len(sizes), device=sizes.device), torch.ones_like(sizes)
    chance = torch.full_like(sizes, count / len(sizes))
    if (total := sizes.sum()) > 0:
        chance = EVENLY * chance + (1 - EVENLY) * count * sizes / total
    for _ in range(8):  # what is more than certain is dealt to the others
        certain = chance >= 1
        left = count - certain.sum()
        chance = torch.where(certain, 1.0, chance * left / chance[~certain].sum().clamp(min=1e-30))
    chance = chance.clamp(max=1.0)
    start = torch.rand(1, generator=generator, device=generator.device).to(chance.device)
    steps = (chance.cumsum(0) + start).floor()
    taken = steps.diff(prepend=start.new_zeros(1)).clamp(max=1) > 0
    return taken.nonzero().flatten(), chance[taken]


def _input_scale(
    group: LinearGroup, entry: ModulePlan, weight: Tensor, hessian: Tensor, rows: Tensor | None
) -> Tensor | None:
    """The product of the scales of all methods that have one, (in,)."""
    fold = group.fold
    if fold is None:
        return None
    total: Tensor | None = None
    for method in entry.input_scalers:
        before = torch.ones_like(hessian[0]) if total is None else total
        cost = entry.quantizer.cost(divided(hessian, before))
        inputs = None if rows is None else rows / before
        part = SitePart(weight * before, entry.scheme, cost)
        choice: InputScale | None = method.input_scale(
            Site([part], lambda channels: tied(channels, fold.spread), inputs)
        )
        if choice is not None:
            scale = tied(choice.scale, fold.spread)
            total = before * (scale.log2().round().exp2() if group.other_readers else scale)
    return total


def expert_statistics(
    groups: Sequence[LinearGroup],
    call: RoutedCall,
    number: int,
    statistics: LayerStatistics,
    expert: nn.Module,
) -> LayerStatistics:
    """Fill the statistics of one expert with what its linears read of the tokens that are routed to it."""
    tokens, _ = call.of(number)
    observers = statistics.observers
    with torch.no_grad():
        for rows in tokens.split(ROWS):
            inputs = call.hidden[rows].to(next(expert.parameters()).dtype)
            for group in groups:
                observers[group.linears[0]](inputs if group.enters else expert.middle(inputs))  # type: ignore[operator]
    return statistics
