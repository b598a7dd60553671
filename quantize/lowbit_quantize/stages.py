"""One layer, observed and rounded: in one pass over the calibration tokens, or in stages that see each other's errors.

AWQ and round-to-nearest need what the compressed layers before a layer give, once. GPTQ aims at what the base model
has (targets.py), and for that it must know what the linears before it in the same layer have become: what attention
reads is observed and rounded first, then what its output linear reads, then the network's first linears, then its
last. The base model's calibration tokens walk beside, through the layer as it was. Once attention is rounded, both go
on to the layer's middle: it runs no more for the stages that follow.
"""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit_quantize.architectures import OUTPUT, LinearGroup
from lowbit_quantize.attention import attention_seen_by
from lowbit_quantize.compress import CompressedLayer, compress_layer, folded_later
from lowbit_quantize.formats import FORMATS
from lowbit_quantize.grid import GridSpec
from lowbit_quantize.kv_scales import UNIT_SCALES, KVScales, calibrated_scales
from lowbit_quantize.observe import KeyValueReach, LayerStatistics, both
from lowbit_quantize.plan import Plan
from lowbit_quantize.stream import END, BasePass, Decoder, KeyValueSeam, without_attention

KEPT_BYTES = 256 << 20


@dataclass(frozen=True)
class Outcome:
    """A compressed layer, its FP8 scales, those of the same layer uncompressed, and the tokens of starved experts."""

    layer: CompressedLayer
    kv_scales: KVScales | None
    base_kv_scales: KVScales | None
    starved: dict[int, int]


class Kept:
    """What attention's last linear reads, batch by batch, if it is about as large as `hidden` and that is not much."""

    def __init__(self, hidden: Tensor) -> None:
        self.fits = hidden.nbytes <= KEPT_BYTES
        self.read: list[Tensor] = []


class Stages:
    """How the layers of one model are observed and rounded under one recipe."""

    def __init__(self, decoder: Decoder, plan: Plan, spec: GridSpec) -> None:
        self._decoder, self._plan, self._spec = decoder, plan, spec
        self._architecture, self._method = plan.architecture, plan.recipe.weights.method

    def compress(self, layer: nn.Module, index: int, hidden: Tensor, base_hidden: Tensor | None) -> Outcome:
        """Round a layer in place on the calibration tokens' hidden states, (sequences, tokens, hidden).

        They are moved on to the next layer, if there is one, and the base model's, where given.
        """
        with ExitStack() as halves:
            return self._compress(layer, index, hidden, base_hidden, halves)

    def _compress(
        self, layer: nn.Module, index: int, hidden: Tensor, base_hidden: Tensor | None, halves: ExitStack
    ) -> Outcome:
        base = None if base_hidden is None else (self._decoder.load_layer(index), base_hidden)
        prefix = f"{self._decoder.layer_name(index)}."
        ignored = frozenset(n.removeprefix(prefix) for n in self._plan.ignored if n.startswith(prefix))
        done, reach, starved = CompressedLayer(), KeyValueReach(), {}
        scales: KVScales | None = None
        base_scales: KVScales | None = None
        stages, groups = self._stages(layer), self._architecture.groups_of(layer)
        for number, stage in enumerate(stages):
            statistics = self._statistics(
                layer, [*stage, *folded_later(groups, stage, self._method, ignored)], done
            )
            advance, kept = self._advance_after(stages, number), Kept(hidden)
            self._observe(layer, index, hidden, base, statistics, scales if number else reach, advance, kept)
            if self._method != "none":
                starved.update(statistics.starved)
                with torch.inference_mode():
                    compress_layer(
                        layer, self._architecture, statistics, self._spec, self._method, ignored, stage, done
                    )
            if number == 0:
                scales = base_scales = self._scales_of(reach, None)
                if done.value_divisor is not None:
                    scales = self._scales_of(reach, done.value_divisor)
            if advance:
                with without_attention(layer, self._architecture, kept.read) if kept.read else nullcontext():
                    self._decoder.advance_to(advance, layer, index, hidden, scales)
                for one in (layer, base[0]) if base else (layer,):
                    halves.enter_context(without_attention(one, self._architecture))
        if index + 1 < self._decoder.depth:
            self._decoder.advance(layer, index, hidden, scales)
        return Outcome(done, scales, base_scales, starved)

    def _stages(self, layer: nn.Module) -> list[list[LinearGroup]]:
        """The groups that are observed and rounded together, in the order of their inputs."""
        groups = self._architecture.groups_of(layer) if self._method != "none" else ()
        if not self._plan.paired:
            return [list(groups)]
        numbers = sorted({group.stage for group in groups})
        return [[group for group in groups if group.stage == number] for number in numbers]

    def _advance_after(self, stages: list[list[LinearGroup]], number: int) -> str | None:
        """How far hidden states go with a stage: to the layer's middle, to its end or nowhere."""
        if number + 1 == len(stages):
            return END
        return self._architecture.middle if stages[number][0].stage == OUTPUT else None

    def _statistics(
        self, layer: nn.Module, groups: Sequence[LinearGroup], done: CompressedLayer
    ) -> LayerStatistics:
        """Empty statistics; those of groups that both models route alike have the base model's inputs as well."""
        paired: dict[str, Tensor | None] = {}
        for group in groups if self._plan.paired else ():
            if not (group.beside or self._architecture.is_expert(group)):
                name = group.linears[0]
                paired[name] = done.folded[name].scale if name in done.folded else None
        return LayerStatistics(layer, self._architecture, self._decoder.device, groups, paired)

    def _observe(
        self,
        layer: nn.Module,
        index: int,
        hidden: Tensor,
        base: tuple[nn.Module, Tensor] | None,
        statistics: LayerStatistics,
        seam: KeyValueSeam | None,
        advance: str | None,
        kept: Kept,
    ) -> None:
        """Run the calibration tokens through a layer as it stands, and the base model's through the base layer."""
        if self._method == "none" and self._plan.recipe.kv_cache.dtype == "none":
            return
        side, expected = None, statistics.base_observers
        if base is not None and (advance is not None or expected):
            side = BasePass(*base, expected, advance)
        observers, stop = statistics.observers, not statistics.routes
        if advance and kept.fits:
            end = self._architecture.attention_end
            observers[end] = both(observers[end], kept.read.append)
        with attention_seen_by(statistics.attended, stop=statistics.ends_before_attention):
            self._decoder.observe(layer, index, hidden, observers, seam, stop=stop, base=side)

    def _scales_of(self, reach: KeyValueReach, value_divisor: Tensor | None) -> KVScales | None:
        """A layer's scales; None without an FP8 cache, and where a layer reads the cache of another."""
        if self._plan.recipe.kv_cache.dtype == "none" or not reach.cached:
            return None
        if not FORMATS[self._plan.recipe.format].carries_kv_scales:
            return UNIT_SCALES
        return calibrated_scales(reach, value_divisor)
