"""One layer, observed and quantized: in one pass over the calibration tokens, or in stages.

AWQ and round-to-nearest need what the compressed layers before a layer give, once. GPTQ aims at what the base model
has (statistics/error_compensation.py), and for that it must know what the linears before it in the same layer have
become: what attention reads is observed and quantized first, then what its output linear reads, then the network's
first linears, then its last. The base model's calibration tokens walk beside, through the layer as it was. Once
attention is quantized, both go on to the layer's middle: it runs no more for the stages that follow.
"""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext

import torch
from torch import Tensor, nn

from lowbit_quantize.model.architecture import Architecture, LinearGroup, kind_of
from lowbit_quantize.model.decoder import END, BasePass
from lowbit_quantize.model.hooks import KVCacheHook, without_attention
from lowbit_quantize.statistics.attention import attention_seen_by
from lowbit_quantize.statistics.kv_absmax import KVAbsmax
from lowbit_quantize.statistics.layer import LayerStatistics, both
from lowbit_quantize.walk.layer import LayerContext
from lowbit_quantize.walk.quantize_linears import QuantizedLayer, folded_later, quantize_linears

KEPT_BYTES = 256 << 20


class Kept:
    """What attention's last linear reads, batch by batch, if it is about as large as `hidden` and that is not much."""

    def __init__(self, hidden: Tensor) -> None:
        self.fits = hidden.nbytes <= KEPT_BYTES
        self.read: list[Tensor] = []


class StagedLayer:
    """How one layer is observed and quantized by its entries in the table."""

    def __init__(self, layer: nn.Module, architecture: Architecture, context: LayerContext) -> None:
        self._layer, self._architecture, self._context = layer, architecture, context
        self._decoder, self._index, self._modules = context.decoder, context.index, context.modules
        groups, self._kind = architecture.groups_of(layer), kind_of(layer)
        self._groups = [group for group in groups if group.linears[0] in self._modules]
        self._done = QuantizedLayer()
        self._absmax = KVAbsmax()
        # The last pass may move the streams; before another they are left as they are.
        hidden, base = context.calibration, context.calibration_base
        self._hidden = hidden if context.last else hidden.clone()
        base_stream = base if base is None or context.last else base.clone()
        self._base = None if base_stream is None else (context.base_layer(), base_stream)

    def quantize(self) -> None:
        """Quantize the layer in place on the calibration tokens, stage by stage."""
        with ExitStack() as halves:
            stages = self._stages()
            for number, stage in enumerate(stages):
                self._quantize_stage(stages, number, stage, halves)
            if self._context.last and self._context.read_on:
                self._decoder.advance(self._layer, self._index, self._hidden, self._context.result.hook)
        self._context.advanced = self._context.last
        self._context.result.linears = self._done.linears

    def _quantize_stage(
        self, stages: list[list[LinearGroup]], number: int, stage: list[LinearGroup], halves: ExitStack
    ) -> None:
        context, layer = self._context, self._layer
        later = folded_later(self._groups, stage, self._modules)
        statistics = self._statistics([*stage, *later])
        advance, kept = self._advance_after(stages, number), Kept(self._hidden)
        hook = context.result.hook if number else self._absmax
        self._observe(statistics, hook, advance, kept)
        if stage:
            context.result.under_calibrated.update(statistics.under_calibrated)
            with torch.no_grad():
                quantize_linears(layer, self._architecture, statistics, self._modules, stage, self._done)
        if number == 0:
            context.set_kv_scales(self._absmax, self._done.value_divisor)
        if advance:
            kind = self._kind
            attention = (kind.attention, kind.attention_end, kind.attention_outputs)
            with without_attention(layer, *attention, kept.read) if kept.read else nullcontext():
                self._decoder.advance_to(advance, layer, self._index, self._hidden, context.result.hook)
            for one in (layer, self._base[0]) if self._base else (layer,):
                halves.enter_context(without_attention(one, *attention))

    def _stages(self) -> list[list[LinearGroup]]:
        """The groups that are observed and quantized together, in the order of their inputs."""
        plans = [self._modules[group.linears[0]] for group in self._groups]
        if self._base is None or not any(plan.compensates for plan in plans):
            return [self._groups]
        numbers = sorted({group.stage for group in self._groups})
        return [[group for group in self._groups if group.stage == number] for number in numbers]

    def _compensates(self, group: LinearGroup) -> bool:
        """Whether a group is aimed at what makes up for earlier errors: not where both models route differently."""
        if self._base is None or group.other_readers or self._architecture.is_expert(group):
            return False
        return self._modules[group.linears[0]].compensates

    def _advance_after(self, stages: list[list[LinearGroup]], number: int) -> str | None:
        """How far hidden states go with a stage: to the layer's middle, to its end or nowhere."""
        if number + 1 == len(stages):
            return END
        ends = any(self._kind.attention_end in group.linears for group in stages[number])
        return self._kind.middle if ends and self._kind.middle else None

    def _statistics(self, groups: Sequence[LinearGroup]) -> LayerStatistics:
        """Empty statistics; those of groups that are compensated have the base model's inputs as well."""
        paired: dict[str, Tensor | None] = {}
        for group in groups:
            if self._compensates(group):
                name = group.linears[0]
                folded = self._done.folded.get(name)
                paired[name] = folded.scale if folded else None
        sampled = {group.linears[0] for group in groups if self._modules[group.linears[0]].samples_inputs}
        return LayerStatistics(self._layer, self._architecture, self._decoder.device, groups, paired, sampled)

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
        if advance and kept.fits:
            end = self._kind.attention_end
            observers[end] = both(observers[end], kept.read.append)
        with attention_seen_by(statistics.attended, stop=statistics.ends_before_attention):
            self._decoder.observe(
                self._layer, self._index, self._hidden, observers, hook,
                stop=not statistics.routes, base=side,
            )  # fmt: skip
