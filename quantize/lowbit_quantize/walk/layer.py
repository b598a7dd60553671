"""What passes are given of a layer, and what they leave behind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from lowbit_quantize.model.architecture import kind_of
from lowbit_quantize.model.decoder import Decoder
from lowbit_quantize.model.experts.visited import RoutedCall
from lowbit_quantize.model.resized import OpenModel
from lowbit_quantize.run.clock import Clock
from lowbit_quantize.schemes.kv_cache import KVScales, calibrated_scales
from lowbit_quantize.schemes.scheme import Quantized
from lowbit_quantize.statistics.kv_absmax import KVAbsmax
from lowbit_quantize.walk.module_plan import Modules
from lowbit_quantize.walk.visit import advance, silent_experts


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantized linear, the exponent of the scale of its inputs, and its relative squared output error."""

    quantized: Quantized
    alpha: float | None
    error: float


@dataclass
class LayerResult:
    """What the checkpoint and the manifest need to know of a layer, beside its weights.

    `base_kv_scales` are those of the same layer as it was; where `fp8_in_use` says no, engines are to keep keys and
    values as they are, and the scales are there for readers that do not know it. `kept_experts` are the base model's
    numbers of those that stay, `absorbed_by` the one of them that absorbed each of the others, where experts were
    merged, `saliency` the base's experts' scores and `expert_tokens` how many tokens each was given, where they were
    pruned, and `under_calibrated` the tokens of each expert, by its number after pruning, that borrowed statistics.
    `figures` are whatever a pass has measured of the layer, for the manifest.
    """

    linears: dict[str, QuantizedLinear] = field(default_factory=dict)
    kv_scales: KVScales | None = None
    base_kv_scales: KVScales | None = None
    fp8_in_use: bool = True
    kept_experts: list[int] | None = None
    absorbed_by: dict[int, int] | None = None
    saliency: list[float] | None = None
    expert_tokens: list[int] | None = None
    under_calibrated: dict[int, int] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def hook(self) -> KVScales | None:
        """What rounds keys and values as the served cache will, if anything."""
        return self.kv_scales if self.fp8_in_use else None

    @property
    def base_hook(self) -> KVScales | None:
        """The same for the layer as it was."""
        return self.base_kv_scales if self.fp8_in_use else None


class ExpertWork(Protocol):
    """What becomes of the routed experts of a compressed layer when they are visited, up to `together` at a time."""

    @property
    def together(self) -> int: ...

    def __call__(
        self, numbers: Sequence[int], calibration: RoutedCall
    ) -> dict[int, dict[str, QuantizedLinear]]:
        """Quantize in place these experts, which the layer holds now, on what all experts are called with."""
        ...


@dataclass
class LayerContext:
    """One layer on the walk. Streams are (sequences, tokens, hidden) and hold what the layer reads.

    `calibration` is the compressed model's stream, `calibration_base` the base model's where it walks too; methods aim
    at that where `compensates` says so. A pass
    that is the `last` may move both on to the next layer itself, where they are `read_on`, and says so in `advanced`;
    any other leaves them as they are. Where the layer routes, both wait for the visit of its experts (walk/visit.py),
    at the layer's middle if the pass says `halfway`, and `expert_work` is what is to be done with each expert then.
    """

    decoder: Decoder
    index: int
    modules: Modules
    calibration: Tensor
    calibration_base: Tensor | None
    fp8_cache: bool
    compensates: bool = True
    scales_by_head: bool = False
    clock: Clock = field(default_factory=Clock)
    read_on: bool = True
    last: bool = False
    advanced: bool = False
    halfway: bool = False
    expert_work: ExpertWork | None = None
    kv_seen: bool = False
    result: LayerResult = field(default_factory=LayerResult)

    def base_layer(self) -> nn.Module:
        """The layer as the base model has it, read anew."""
        return self.decoder.load_frame(self.index)

    def base_output(self) -> Tensor:
        """What the base model's layer gives for `calibration_base`, or for `calibration` where that alone walks."""
        stream = self.calibration if self.calibration_base is None else self.calibration_base
        output = stream.clone()
        advance(self.decoder, self.base_layer(), self.index, output)
        return output

    def set_kv_scales(self, seen: KVAbsmax, value_divisor: Tensor | None = None) -> None:
        """Choose the scales of keys and values that were seen before value channels were divided by `value_divisor`.

        None without an FP8 cache, and where a layer reads the cache of another.
        """
        self.kv_seen = True
        if not self.fp8_cache or not seen.cached:
            return
        absmax, samples = (seen.key, seen.value), (seen.key_sample, seen.value_sample)
        by_head = self.scales_by_head
        plain = calibrated_scales(absmax, samples, None, by_head=by_head)
        self.result.base_kv_scales = self.result.kv_scales = plain
        if value_divisor is not None:
            self.result.kv_scales = calibrated_scales(absmax, samples, value_divisor, by_head=by_head)

    def finish(self, layer: nn.Module) -> None:
        """Do what no pass has done: choose the cache's scales, and move the streams on to the next layer."""
        if self.fp8_cache and not self.kv_seen:
            seen = KVAbsmax()
            with silent_experts(layer):
                self.decoder.observe(layer, self.index, self.calibration, {}, seen, stop=False)
            self.set_kv_scales(seen)
        if not self.read_on or kind_of(layer).experts:
            return
        if self.calibration_base is not None and not (self.advanced and self.compensates):
            self.decoder.advance(self.base_layer(), self.index, self.calibration_base)
        if self.advanced:
            return
        self.decoder.advance(layer, self.index, self.calibration, self.result.hook)


class Pass(Protocol):
    """Something done to each layer, in the order of the recipe.

    `on_trial`: it is kept only if held-out KL falls. `before_quantize`: it changes
    weights or their names, and so stands before `quantize`. `resizes`: its configuration is one of other sizes, of
    which a model is built before the walk begins; its layers must have these shapes afterwards. `needs_base_stream`: it
    is to be given the base model's calibration tokens, which then walk too. `bytes_a_weight`: what it holds beside a
    layer for each of its weights.
    """

    @property
    def name(self) -> str: ...
    @property
    def on_trial(self) -> bool: ...
    @property
    def before_quantize(self) -> bool: ...
    @property
    def resizes(self) -> bool: ...

    def fitted(self, walked: OpenModel, served: OpenModel) -> "Pass":
        """The pass for layers of one model that become those of another; raises RecipeError. For one that `resizes`."""
        ...

    @property
    def needs_base_stream(self) -> bool: ...
    @property
    def bytes_a_weight(self) -> int: ...

    def check(self, modules: Modules) -> None:
        """Raise RecipeError where the pass does not fit what the table says of the model's linears."""
        ...

    def run(self, layer: nn.Module, context: LayerContext) -> None:
        """Change the layer in place."""
        ...

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of a tensor of the model after the pass, by its full name; None if it is gone."""
        ...

    def configuration(self) -> Mapping[str, Any]:
        """Keys of the model's configuration that the pass changes."""
        ...
