"""The pass that tunes a layer after it is quantized: its codes, scales and norms on the base model's outputs.

Attention and MLP of a layer are tuned together, layer by layer as the walk goes, with the gradients of one layer in
memory (tune_layer.py). It stands after `quantize`, whatever methods chose the codes.
"""

from dataclasses import replace
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from lowbit_core.documents import Section
from lowbit_core.errors import RecipeError
from lowbit_quantize.device import ranks
from lowbit_quantize.model.architecture import Architecture, linear_of
from lowbit_quantize.passes.kind import PlainPass
from lowbit_quantize.passes.tune_layer import LayerTuning, Rates, Tuned
from lowbit_quantize.recipe import QUANTIZE
from lowbit_quantize.schemes.integer import Integer
from lowbit_quantize.walk.layer import LayerContext
from lowbit_quantize.walk.module_plan import Modules

NAME = "tune"
BITS = (2, 3, 4)  # whose codes a gradient can choose among few neighbours of


class TuneOptions(Section):
    """How long and how far: passes over the calibration rows that are trained on, how far all steps of one direction
    move a code, by which share Adam moves scales and norms at first, and every how many rows one is set aside.
    """

    epochs: int = Field(default=2, ge=1, le=100, strict=True)
    code_travel: float = Field(default=0.75, ge=0, le=8)
    scale_rate: float = Field(default=0.005, ge=0, le=0.1)
    norm_rate: float = Field(default=0.005, ge=0, le=0.1)
    set_aside_every: int = Field(default=8, ge=2, le=64, strict=True)
    seed: int = 0

    @property
    def rates(self) -> Rates:
        return Rates(self.epochs, self.code_travel, self.scale_rate, self.norm_rate)


class Tune(PlainPass):
    """Tunes each layer that has quantized linears; the layer stays as it was where that gains nothing."""

    name = NAME
    before_quantize = False
    bytes_a_weight = 24  # a code's number, its weight and both gradients, and two states of the codes

    def __init__(self, architecture: Architecture, options: TuneOptions) -> None:
        self._architecture, self._options = architecture, options

    @property
    def needs_base_stream(self) -> bool:
        return True

    def check(self, modules: Modules) -> None:
        for name, entry in modules.items():
            scheme = entry.scheme
            fits = isinstance(scheme, Integer) and scheme.input_quantizer is None and scheme.bits in BITS
            if name != self._architecture.head and not fits:
                raise RecipeError(
                    f"{NAME}: {name} has the scheme {scheme.name}; codes are learned of W2A16, W3A16, W4A16 and "
                    f"W4A16_ASYM; give it one of these, leave it as it is with scheme: none, or leave {NAME} out"
                )

    def run(self, layer: nn.Module, context: LayerContext) -> None:
        wanted, linears = context.base_output(), context.result.linears
        if linears:
            tuned = ranks.by_first(lambda: self._tuned(layer, context, wanted), context.decoder.device)
            context.result.figures |= {"tuning_error_before": tuned.before, "tuning_error_after": tuned.after}
            for name, quantized in tuned.linears.items():
                linear = linear_of(layer, name)
                linear.weight = nn.Parameter(
                    quantized.dequantize().to(linear.weight.dtype), requires_grad=False
                )
                linears[name] = replace(linears[name], quantized=quantized)
            for name, weight in tuned.norms.items():
                layer.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
        if context.last and context.calibration_base is not None and context.read_on:
            if context.compensates:
                context.calibration_base.copy_(wanted)
            context.decoder.advance(layer, context.index, context.calibration, context.result.hook)
            context.advanced = True

    def _tuned(self, layer: nn.Module, context: LayerContext, wanted: Tensor) -> Tuned:
        options, rows = self._options, len(context.calibration)
        if rows < 2:
            raise RecipeError(
                f"{NAME}: calibration.num_samples is {rows}, and rows are set aside to judge by; give 2 or more"
            )
        quantized = {name: one.quantized for name, one in context.result.linears.items()}
        with ranks.alone():
            tuning = LayerTuning(
                context.decoder,
                layer,
                context.index,
                quantized,
                self._norms(layer, quantized),
                context.result.hook,
            )
            aside = judging_rows(rows, options.set_aside_every)
            return tuning.run(context.calibration, wanted, aside, options.rates, options.seed)

    def _norms(self, layer: nn.Module, quantized: dict[str, Any]) -> list[str]:
        """Norms whose channels quantized linears read, and nothing else."""
        groups = [group for group in self._architecture.groups_of(layer) if group.fold and group.fold.norm]
        found = dict.fromkeys(group.fold.producer for group in groups if group.fold)
        return [
            name
            for name in found
            if all(
                linear in quantized and not group.other_readers
                for group in groups
                if group.fold and group.fold.producer == name
                for linear in group.linears
            )
        ]


def judging_rows(rows: int, every: int) -> list[int]:
    """One of every so many rows, each time a place further on: where domains lie in turns, all of them judge."""
    found = (start + turn % every for turn, start in enumerate(range(0, rows, every)))
    return [row for row in found if row < rows]


class TuneKind:
    """What a recipe can say, and whether it fits a model."""

    name = NAME
    options = TuneOptions
    after = (QUANTIZE,)

    def make(self, options: TuneOptions, config: Any, architecture: Architecture, model: str) -> Tune:
        """Raises RecipeError where layers cannot be trained as they are walked."""
        if architecture.moe_block:
            raise RecipeError(
                f"{NAME}: {model} ({architecture.model_type}) has routed experts, which are visited one by one and not "
                f"tuned together; leave {NAME} out"
            )
        if not architecture.stream.plain:
            raise RecipeError(
                f"{NAME}: {model} ({architecture.model_type}) has layers that read more than one stream of hidden "
                f"states; leave {NAME} out"
            )
        return Tune(architecture, options)
