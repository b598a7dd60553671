"""One layer, observed and rounded: in one pass over the calibration tokens, or in stages that see each other's errors.

AWQ and round-to-nearest need what the compressed layers before a layer give, once. GPTQ aims at what the base model
has (targets.py), and for that it must know what the linears before it in the same layer have become: what attention
reads is observed and rounded first, then what its output linear reads, then the network's first linears, then its
last. The base model's calibration tokens walk beside, through the layer as it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit_quantize.architectures import LinearGroup, linear_of
from lowbit_quantize.attention import attention_seen_by
from lowbit_quantize.compress import CompressedLayer, compress_layer, folded_later
from lowbit_quantize.formats import FORMATS
from lowbit_quantize.grid import GridSpec
from lowbit_quantize.kv_scales import UNIT_SCALES, KVScales, calibrated_scales
from lowbit_quantize.observe import KeyValueReach, LayerStatistics
from lowbit_quantize.plan import Plan
from lowbit_quantize.stream import BasePass, Decoder, KeyValueSeam


@dataclass(frozen=True)
class Outcome:
    """A compressed layer, its FP8 scales, those of the same layer uncompressed, and the tokens of starved experts."""

    layer: CompressedLayer
    kv_scales: KVScales | None
    base_kv_scales: KVScales | None
    starved: dict[int, int]


class Stages:
    """How the layers of one model are observed and rounded under one recipe."""

    def __init__(self, decoder: Decoder, plan: Plan, spec: GridSpec) -> None:
        self._decoder, self._plan, self._spec = decoder, plan, spec
        self._architecture, self._method = plan.architecture, plan.recipe.weights.method

    def compress(self, layer: nn.Module, index: int, hidden: Tensor, base_hidden: Tensor | None) -> Outcome:
        """Round a layer in place on the calibration tokens' hidden states, (sequences, tokens, hidden).

        The base model's hidden states, where given, are moved on to its next layer.
        """
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
            last = number + 1 == len(stages)
            self._observe(layer, index, hidden, base, statistics, scales if number else reach, last=last)
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
        return Outcome(done, scales, base_scales, starved)

    def _stages(self, layer: nn.Module) -> list[list[LinearGroup]]:
        """The groups that are observed and rounded together, in the order of their inputs."""
        groups = self._architecture.groups_of(layer) if self._method != "none" else ()
        if not self._plan.paired:
            return [list(groups)]
        numbers = sorted({group.stage for group in groups})
        return [[group for group in groups if group.stage == number] for number in numbers]

    def _statistics(
        self, layer: nn.Module, groups: Sequence[LinearGroup], done: CompressedLayer
    ) -> LayerStatistics:
        """Empty statistics; those of groups that both models route alike have the base model's inputs as well."""
        paired = {}
        for group in groups if self._plan.paired else ():
            if not (group.beside or self._architecture.is_expert(group)):
                name = group.linears[0]
                one = torch.ones(linear_of(layer, name).in_features, device=self._decoder.device)
                paired[name] = done.folded[name].scale if name in done.folded else one
        return LayerStatistics(layer, self._architecture, self._decoder.device, groups, paired)

    def _observe(
        self,
        layer: nn.Module,
        index: int,
        hidden: Tensor,
        base: tuple[nn.Module, Tensor] | None,
        statistics: LayerStatistics,
        seam: KeyValueSeam | None,
        *,
        last: bool,
    ) -> None:
        """Run the calibration tokens through a layer as it stands, and the base model's through the base layer."""
        if self._method == "none" and self._plan.recipe.kv_cache.dtype == "none":
            return
        side, expected = None, statistics.base_observers
        if base is not None and (last or expected):
            side = BasePass(*base, expected, advance=last)
        observers, stop = statistics.observers, not statistics.routes
        with attention_seen_by(statistics.attended):
            self._decoder.observe(layer, index, hidden, observers, seam, stop=stop, base=side)

    def _scales_of(self, reach: KeyValueReach, value_divisor: Tensor | None) -> KVScales | None:
        """A layer's scales; None without an FP8 cache, and where a layer reads the cache of another."""
        if self._plan.recipe.kv_cache.dtype == "none" or not reach.cached:
            return None
        if not FORMATS[self._plan.recipe.format].carries_kv_scales:
            return UNIT_SCALES
        return calibrated_scales(reach, value_divisor)
