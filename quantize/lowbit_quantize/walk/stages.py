"""One layer, observed and quantized: in one pass over the calibration tokens, or in stages.

Round-to-nearest and SmoothQuant need what the compressed layers before a layer give, once. AWQ and GPTQ aim at what
the base model has (statistics/error_compensation.py), and for that they must know what the linears before it in the
same layer have become: what attention reads is observed and quantized first, then what its output linear reads, then
the network's first linears, then its last. The base model's calibration tokens walk beside, through the layer as it
was. Once attention is quantized, both go on to the layer's middle: it runs no more for the stages that follow. Nor does
the network before its last linear, where what that reads was kept.

Routed experts are none of these stages: what all of them read is observed with the first linears of the networks beside
them, and each is quantized when it is visited (walk/expert_work.py).
"""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit_quantize.device import ranks
from lowbit_quantize.methods.method import InputScale
from lowbit_quantize.model.architecture import Architecture, LinearGroup, kind_of, linear_of
from lowbit_quantize.model.decoder import END, BasePass
from lowbit_quantize.model.hooks import KVCacheHook, without_attention
from lowbit_quantize.recipe import QUANTIZE
from lowbit_quantize.run.clock import OBSERVE
from lowbit_quantize.statistics.attention import attention_seen_by
from lowbit_quantize.statistics.kv_absmax import KVAbsmax
from lowbit_quantize.statistics.layer import LayerStatistics, both
from lowbit_quantize.walk.expert_work import ExpertQuantizer
from lowbit_quantize.walk.layer import LayerContext
from lowbit_quantize.walk.quantize_linears import QuantizedLayer, fold_norms, folded_later, quantize_linears
from lowbit_quantize.walk.visit import Traveller, experts_of, silent_experts

KEPT_BYTES = 256 << 20


class Kept:
    """What a linear of the layer reads, (tokens, features), batch by batch; no `name`, no more than `KEPT_BYTES`."""

    def __init__(self, layer: nn.Module, name: str, hidden: Tensor) -> None:
        size = hidden.shape[-1] if not name else linear_of(layer, name).in_features
        self.name = name if hidden.nbytes // hidden.shape[-1] * size <= KEPT_BYTES else ""
        self.read: list[Tensor] = []


@dataclass(frozen=True)
class Stage:
    """Groups that are quantized together, and those of routed experts whose inputs are observed with them."""

    groups: list[LinearGroup]
    entering: list[LinearGroup]


class StagedLayer:
    """How one layer is observed and quantized by its entries in the table."""

    def __init__(self, layer: nn.Module, architecture: Architecture, context: LayerContext) -> None:
        self._layer, self._architecture, self._context = layer, architecture, context
        self._decoder, self._index, self._modules = context.decoder, context.index, context.modules
        self._all, self._kind = architecture.groups_of(layer), kind_of(layer)
        quantized = [group for group in self._all if group.linears[0] in self._modules]
        self._groups = [group for group in quantized if not architecture.is_expert(group)]
        self._expert_groups = [group for group in quantized if architecture.is_expert(group)]
        self._entering = [group for group in self._expert_groups if group.enters]
        self._block: LayerStatistics | None = None
        self._done = QuantizedLayer()
        self._absmax = KVAbsmax()
        self._kept = Kept(layer, "", context.calibration)
        # The last pass may move the streams; before another they are left as they are.
        hidden, base = context.calibration, context.calibration_base if context.compensates else None
        self._hidden = hidden if context.last else hidden.clone()
        base_stream = base if base is None or context.last else base.clone()
        self._base = None if base_stream is None else (context.base_layer(), base_stream)

    def quantize(self) -> None:
        """Quantize the layer in place on the calibration tokens, stage by stage."""
        context, routed = self._context, bool(self._kind.experts)
        with ExitStack() as halves:
            both_layers = (self._layer, self._base[0]) if self._base else (self._layer,)
            halves.enter_context(silent_experts(*both_layers))
            stages = self._stages()
            for number in range(len(stages)):
                self._quantize_stage(stages, number, halves)
            if context.last and context.read_on and not routed:
                self._move_to_end()
        context.advanced = context.last and not routed
        context.result.linears = self._done.linears
        if self._expert_groups:
            context.expert_work = self._expert_work()
            if not context.last:
                self._quantize_experts_now(context.expert_work)

    def _quantize_stage(self, stages: list[Stage], number: int, halves: ExitStack) -> None:
        context, layer, stage = self._context, self._layer, stages[number]
        later = folded_later(self._groups, stage.groups, self._modules)
        statistics = self._statistics([*stage.groups, *later], stage.entering)
        advance = self._advance_after(stages, number)
        kept = self._kept = Kept(layer, self._worth_keeping(stage, advance), self._hidden)
        hook = context.result.hook if number else self._absmax
        context.clock.begin(OBSERVE)
        self._observe(statistics, hook, advance, kept)
        context.clock.begin(QUANTIZE)
        if stage.groups or stage.entering:
            with torch.no_grad():
                together = [*stage.groups, *stage.entering]
                norms = fold_norms(layer, self._all, together, statistics, self._modules)
                quantize_linears(
                    layer,
                    self._architecture,
                    statistics,
                    self._modules,
                    stage.groups,
                    self._done,
                    self._groups,
                    norms,
                )
            self._take_block(statistics, stage.entering, norms)
        if number == 0:
            context.set_kv_scales(self._absmax, self._done.value_divisor)
        context.clock.begin(OBSERVE)
        if advance:
            kind = self._kind
            context.halfway = advance != END
            attention = (kind.attention, kind.attention_end, kind.attention_outputs)
            read = ranks.own(kept.read)  # by the batches that run here
            with without_attention(layer, *attention, read) if kept.read else nullcontext():
                self._decoder.advance_to(advance, layer, self._index, self._hidden, context.result.hook)
            for one in (layer, self._base[0]) if self._base else (layer,):
                halves.enter_context(without_attention(one, *attention))

    def _worth_keeping(self, stage: Stage, advance: str | None) -> str:
        """The linear whose inputs spare what is before it when hidden states go on: attention's last, or the layer's.

        None where that must run again, to leave tensors for later layers.
        """
        kind = self._kind
        if kind.leaves or advance is None:
            return ""
        if advance != END:
            return kind.attention_end
        plain = self._decoder.architecture.stream.plain
        observed = any(kind.closing == group.linears[0] for group in stage.groups)
        return kind.closing if plain and self._context.halfway and observed else ""

    def _move_to_end(self) -> None:
        """Move hidden states on to the layer's end; where it was kept what the last linear reads, that alone runs."""
        hidden, kept, decoder = self._hidden, self._kept, self._decoder
        if not kept.read:
            decoder.advance(self._layer, self._index, hidden, self._context.result.hook)
            return
        last, read = self._layer.get_submodule(kept.name), iter(ranks.own(kept.read))

        def output(batch: slice) -> Tensor:
            rows = hidden[batch].to(decoder.device)
            with torch.no_grad():
                return torch.add(rows, last(next(read)).view_as(rows))

        decoder.replace_dealt(hidden, output)

    def _stages(self) -> list[Stage]:
        """What is observed and quantized together, in the order of inputs."""
        if not self._staged:
            return [Stage(self._groups, self._entering)]
        numbers = sorted({group.stage for group in (*self._groups, *self._entering)})
        return [
            Stage(
                [group for group in self._groups if group.stage == number],
                [group for group in self._entering if group.stage == number],
            )
            for number in numbers
        ]

    @property
    def _staged(self) -> bool:
        """Whether what is quantized first changes what the rest is quantized on."""
        groups = (*self._groups, *self._expert_groups)
        return self._base is not None and any(self._modules[group.linears[0]].compensates for group in groups)

    def _take_block(
        self, statistics: LayerStatistics, entering: list[LinearGroup], norms: dict[str, InputScale]
    ) -> None:
        """Keep what all routed experts read, as they will read it, and let them have the scales of their inputs."""
        if not entering:
            return
        statistics.finish_block()
        self._block, experts = statistics, experts_of(self._layer)
        fold = entering[0].fold
        scale = norms.get(fold.producer) if fold else None
        if scale is None:
            return
        statistics.divide_block(scale.scale)
        for name in entering[0].linears:
            experts.multiply(experts.inside(name.removeprefix(f"{self._kind.experts}.")), scale.scale)
        self._done.taken.update({group.linears[0]: scale for group in entering})

    def _quantize_experts_now(self, work: ExpertQuantizer) -> None:
        """Another pass wants the layer as it will be served: quantize its experts, and keep them in memory."""
        context, experts = self._context, experts_of(self._layer)
        hook = context.result.hook
        calibration = Traveller(self._hidden, self._layer, hook, halfway=context.halfway)
        calibration.record(self._decoder, self._index)
        with ranks.alone():  # each rank wants all of them
            for first in range(0, len(experts), work.together):
                numbers = range(len(experts))[first : first + work.together]
                experts.hold(numbers)
                for number, linears in work(numbers, calibration.called).items():
                    context.result.linears.update(linears)
                    experts.keep(number)
                experts.let_go()
        context.expert_work, context.halfway = None, False

    def _expert_work(self) -> ExpertQuantizer:
        assert self._block is not None
        return ExpertQuantizer(
            self._layer, self._architecture, self._modules, self._expert_groups, self._block, self._done.taken,
            staged=self._staged, under_calibrated=self._context.result.under_calibrated,
        )  # fmt: skip

    def _compensates(self, group: LinearGroup) -> bool:
        """Whether a group is aimed at what makes up for earlier errors: not where both models route differently."""
        if self._base is None or group.other_readers:
            return False
        return self._modules[group.linears[0]].compensates

    def _advance_after(self, stages: list[Stage], number: int) -> str | None:
        """How far hidden states go with a stage: to the layer's middle, to its end or nowhere."""
        if number + 1 == len(stages) and not self._kind.experts:
            return END
        if not self._staged:  # what attention's last linear read was seen before any of this was quantized
            return None
        ends = any(self._kind.attention_end in group.linears for group in stages[number].groups)
        return self._kind.middle if ends and self._kind.middle else None

    def _statistics(self, groups: Sequence[LinearGroup], entering: Sequence[LinearGroup]) -> LayerStatistics:
        """Empty statistics; those of groups that are compensated have the base model's inputs as well.

        With `entering`, what all routed experts read is observed too.
        """
        paired: dict[str, Tensor | None] = {}
        for group in groups:
            if self._compensates(group):
                name = group.linears[0]
                folded = self._done.folded.get(name)
                paired[name] = folded.scale if folded else None
        sampled = {
            group.linears[0]
            for group in (*groups, *entering)
            if self._modules[group.linears[0]].samples_inputs
        }
        return LayerStatistics(
            self._layer, self._architecture, self._decoder.device, groups, paired, sampled, entering=entering,
            base=self._base[0] if self._base else None,
        )  # fmt: skip

    def _observe(
        self, statistics: LayerStatistics, hook: KVCacheHook | None, advance: str | None, kept: Kept
    ) -> None:
        """Run the calibration tokens through a layer as it stands, and the base model's through the base layer."""
        observers, expected = statistics.observers, statistics.base_observers
        if not observers and self._base is None and not self._context.fp8_cache:
            return
        side = None
        if self._base is not None and (advance is not None or expected):
            side = BasePass(*self._base, expected, advance)
        if kept.name:
            observers[kept.name] = both(observers[kept.name], kept.read.append)
        with attention_seen_by(statistics.attended, stop=statistics.ends_before_attention):
            self._decoder.observe(
                self._layer, self._index, self._hidden, observers, hook,
                stop=not statistics.routes, base=side,
            )  # fmt: skip
