"""The linears of a layer, quantized: scales folded into what comes before, weights replaced by what will be served.

Everything here is arithmetic on the layer's weights and on what was observed; no forward pass. First each norm
takes the scale of all that reads it; then each chain of linears, attention's or one network's, is folded and
quantized by itself, so that the float32 copies of one expert are alive at a time.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_core.errors import NumericsError
from lowbit_quantize.device.factors import divided
from lowbit_quantize.device.precision import exact_products
from lowbit_quantize.methods.method import InputScale, Method, Site, SitePart
from lowbit_quantize.model.architecture import Architecture, Fold, LinearGroup, kind_of, linear_of
from lowbit_quantize.model.experts.visited import VisitedExperts
from lowbit_quantize.model.folds import (
    divide_bias,
    divide_norm,
    divisor_of,
    multiply_columns,
    tied,
)
from lowbit_quantize.schemes.rounding_linear import RoundingLinear
from lowbit_quantize.schemes.scheme import Quantized
from lowbit_quantize.statistics.hessian import output_error
from lowbit_quantize.statistics.input_sample import InputSample
from lowbit_quantize.statistics.layer import LayerStatistics
from lowbit_quantize.walk.layer import QuantizedLinear
from lowbit_quantize.walk.module_plan import ModulePlan, Modules

SITE_ROWS = 4096  # rows, over all its readers, that the scale of a norm is searched on
REPORT_ROWS = 256  # outputs of a linear whose error stands for it in the report


@dataclass
class QuantizedLayer:
    """The quantized linears by name, and what each cached value channel was divided by.

    `folded` holds, by first linear, the scales of groups that are quantized in a later stage, where the linear before
    is divided already; `taken` those that the weights have been multiplied by as well.
    """

    linears: dict[str, QuantizedLinear] = field(default_factory=dict)
    value_divisor: Tensor | None = None
    folded: dict[str, InputScale] = field(default_factory=dict)
    taken: dict[str, InputScale] = field(default_factory=dict)


@dataclass
class Waiting:
    """A group's weights (stacked), Hessian and scale of its inputs, on the way to being quantized.

    `sample` has inputs as they were observed, divided by `already` where a scale was folded before that.
    """

    group: LinearGroup
    plan: ModulePlan
    weight: Tensor
    hessian: Tensor
    sample: InputSample | None = None
    folded: InputScale | None = None
    already: Tensor | None = None
    producer_divisor: Tensor | None = None

    def scale_columns(self, folded: InputScale) -> None:
        """Take a scale that the inputs were divided by, after those taken before."""
        self.weight = self.weight * folded.scale
        self.hessian = divided(self.hessian, folded.scale)
        self.folded = folded if self.folded is None else _product(self.folded, folded)

    @property
    def inputs(self) -> Tensor | None:
        """Some of the inputs as they are served, (tokens, in), where they are kept."""
        return None if self.sample is None else self.sample.rows() / self._divisor

    @property
    def _divisor(self) -> Tensor | float:
        """What observed inputs are divided by since."""
        scale = 1.0 if self.folded is None else self.folded.scale
        return scale if self.already is None else scale / self.already

    def with_input_scale(self, found: Quantized) -> Quantized:
        """Its quantized weight, with the scale of its inputs where the scheme has a calibrated one."""
        quantizer = self.plan.scheme.input_quantizer
        if quantizer is None or self.sample is None or not quantizer.static:
            return found
        absmax, rows = self.sample.absmax / self._divisor, self.sample.rows() / self._divisor
        return replace(found, input_scale=quantizer.calibrated(absmax, rows))


def quantize_linears(
    layer: nn.Module,
    architecture: Architecture,
    statistics: LayerStatistics,
    modules: Modules,
    stage: Sequence[LinearGroup],
    done: QuantizedLayer,
    groups: Sequence[LinearGroup] | None = None,
    norms: Mapping[str, InputScale] | None = None,
) -> None:
    """Quantize the groups of a stage in place, by their entries in `modules`, and add what to store to `done`.

    `statistics` are of the stage and of what `folded_later` says; `groups` are the layer's, by default all of them;
    `norms` has the scales that were folded into norms, by default they are searched and folded now. Raises
    NumericsError on a weight that is not finite.
    """
    groups = architecture.groups_of(layer) if groups is None else groups
    later = folded_later(groups, stage, modules)
    if norms is None:
        norms = fold_norms(layer, groups, stage, statistics, modules)
    for chain in chains([*stage, *later]):
        for waiting in prepared(layer, chain, later, statistics, modules, done, norms):
            serve_alike(layer, [(done, [waiting])])


def prepared(
    layer: nn.Module,
    chain: Sequence[LinearGroup],
    later: Collection[LinearGroup],
    statistics: LayerStatistics,
    modules: Modules,
    done: QuantizedLayer,
    norms: Mapping[str, InputScale],
) -> list[Waiting]:
    """A chain of groups, scaled and folded, but for those of a later stage; scales are noted in `done`."""
    states = [_state_of(layer, group, statistics, norms, modules, done) for group in chain]
    for state in states:
        _fold_linear(layer, state, states)
    for state in states:
        if state.group.cached and state.producer_divisor is not None:
            done.value_divisor = state.producer_divisor
        if state.group in later and state.folded:
            done.folded[state.group.linears[0]] = state.folded
    return [state for state in states if state.group not in later]


def serve_alike(layer: nn.Module, waiting: Sequence[tuple[QuantizedLayer, Sequence[Waiting]]]) -> None:
    """Quantize what waits, those of one shape and one entry in the table at once, and let the layer compute with it."""
    alike: dict[tuple[ModulePlan, torch.Size], list[tuple[QuantizedLayer, Waiting]]] = {}
    for done, states in waiting:
        for state in states:
            alike.setdefault((state.plan, state.weight.shape), []).append((done, state))
    for (plan, _), some in alike.items():
        found = _quantized([state for _, state in some], plan)
        for (done, state), quantized in zip(some, found, strict=True):
            done.linears.update(_install(layer, state, state.with_input_scale(quantized)))


def _quantized(states: Sequence[Waiting], plan: ModulePlan) -> list[Quantized]:
    if len(states) == 1:
        return [plan.quantized(states[0].weight, states[0].hessian)]
    weight, hessian = (torch.stack([getattr(state, of) for state in states]) for of in ("weight", "hessian"))
    return plan.quantized(weight, hessian).split()


def fold_norms(
    layer: nn.Module,
    groups: Sequence[LinearGroup],
    stage: Sequence[LinearGroup],
    statistics: LayerStatistics,
    modules: Modules,
) -> dict[str, InputScale]:
    """Scales of what the groups of a stage read, folded into the norms that give it, by the names of these."""
    return {
        norm.producer: folded
        for norm in dict.fromkeys(group.fold for group in stage if group.fold and group.fold.norm)
        if (folded := _fold_norm(layer, groups, norm, stage, statistics, modules))
    }


def folded_later(
    groups: Sequence[LinearGroup], stage: Sequence[LinearGroup], modules: Modules
) -> list[LinearGroup]:
    """Groups of later stages whose scale folds into a linear of this one: it is chosen before that is quantized."""
    producers = {name for group in stage for name in group.linears}
    return [
        group
        for group in groups
        if group.fold is not None
        and group.fold.producer in producers
        and group not in stage
        and group.linears[0] in modules
        and modules[group.linears[0]].input_scalers
    ]


def chains(groups: Sequence[LinearGroup]) -> list[list[LinearGroup]]:
    """Groups in runs: one whose scale folds into a linear joins the run that the linear is in."""
    found: list[list[LinearGroup]] = []
    run_of: dict[str, list[LinearGroup]] = {}
    for group in groups:
        chain = run_of.get(group.fold.producer if group.fold else "")
        if chain is None:
            chain = []
            found.append(chain)
        chain.append(group)
        run_of.update(dict.fromkeys(group.linears, chain))
    return found


def _weight_of(layer: nn.Module, group: LinearGroup, step: int = 1) -> Tensor:
    """Every `step`-th row of a group's stacked weight, float32; raises NumericsError on one that is not finite."""
    weights = [linear_of(layer, name).weight[::step].float() for name in group.linears]
    for name, weight in zip(group.linears, weights, strict=True):
        if not torch.isfinite(weight).all():
            raise NumericsError(f"the weight {name} of the base model holds values that are not finite")
    return torch.cat(weights)


def _state_of(
    layer: nn.Module,
    group: LinearGroup,
    statistics: LayerStatistics,
    norms: Mapping[str, InputScale],
    modules: Modules,
    done: QuantizedLayer,
) -> Waiting:
    hessian, first = statistics.hessian(group), group.linears[0]
    weight, folded = _weight_of(layer, group), done.folded.get(first)
    if folded is not None:  # its inputs are divided already
        weight = weight * folded.scale
    folded = folded or done.taken.get(first)
    target = statistics.target(group, weight, hessian)
    plan, sample = modules[first], statistics.sample(group)
    already = None if folded is None else folded.scale
    state = Waiting(group, plan, target, hessian, sample, folded, already)
    if group.fold is not None and group.fold.norm and group.fold.producer in norms:
        state.scale_columns(norms[group.fold.producer])
    return state


def _fold_norm(
    layer: nn.Module,
    groups: Sequence[LinearGroup],
    fold: Fold,
    stage: Sequence[LinearGroup],
    statistics: LayerStatistics,
    modules: Modules,
) -> InputScale | None:
    """Search one scale for all groups that read a norm and divide the norm by it, for each method that scales.

    What reads the norm and is not quantized (a router, an ignored linear) is multiplied in its own dtype: the scale
    is then of powers of two, so that it computes bit for bit what it did.
    """
    name = fold.producer
    readers = [group for group in groups if group.fold and group.fold.producer == name]
    quantized = [group for group in readers if group in stage]
    plain = {other for group in readers for other in group.other_readers}
    plain.update(linear for group in readers if group not in stage for linear in group.linears)
    norm, folded = layer.get_submodule(name), None
    for method in dict.fromkeys(m for group in quantized for m in modules[group.linears[0]].input_scalers):
        choice = method.input_scale(_norm_site(layer, method, quantized, statistics, modules, folded))
        if choice is None:
            continue
        scale = choice.scale.log2().round().exp2() if plain else choice.scale
        scale = divide_norm(norm, divisor_of(fold, scale), fold.offset)
        scale = fold.spread.by_column(scale)
        _multiply(layer, plain, scale)
        choice = InputScale(scale, choice.alpha)
        folded = choice if folded is None else _product(folded, choice)
    return folded


def _multiply(layer: nn.Module, names: Collection[str], scale: Tensor) -> None:
    """Multiply the columns of modules of a layer; of experts that are visited, whenever they are made."""
    experts, alike = kind_of(layer).experts, set()
    routed: Any = layer.get_submodule(experts) if experts else None
    for name in names:
        if isinstance(routed, VisitedExperts) and name.startswith(f"{experts}."):
            alike.add(routed.inside(name.removeprefix(f"{experts}.")))
        else:
            multiply_columns(layer.get_submodule(name), scale)
    for name in sorted(alike):
        routed.multiply(name, scale)


def _norm_site(
    layer: nn.Module,
    method: Method,
    quantized: Sequence[LinearGroup],
    statistics: LayerStatistics,
    modules: Modules,
    folded: InputScale | None,
) -> Site:
    """The linears behind a norm that a method scales; those that are quantized alike are one part.

    `folded` is what an earlier method has divided the inputs by.
    """
    rows = sum(_outputs(layer, name) for group in quantized for name in group.linears)
    step = 1 if len(quantized) == 1 else max(1, -(-rows // SITE_ROWS))
    hessian = statistics.joint_hessian(quantized)
    if folded is not None:
        hessian = divided(hessian, folded.scale)
    sample = statistics.joint_sample(quantized)
    alike: dict[ModulePlan, list[Tensor]] = {}
    for group in quantized:
        plan = modules[group.linears[0]]
        if method in plan.methods:
            weight = _weight_of(layer, group, step)
            alike.setdefault(plan, []).append(weight if folded is None else weight * folded.scale)
    fold = quantized[0].fold
    assert fold is not None
    return Site(
        [
            SitePart(torch.cat(weights), plan.scheme, plan.quantizer.cost(hessian))
            for plan, weights in alike.items()
        ],
        tie=lambda channels: tied(channels, fold.spread),
        inputs=None if sample is None else sample.rows() / (1.0 if folded is None else folded.scale),
    )


def _outputs(layer: nn.Module, name: str) -> int:
    """Outputs of a linear, for which no expert has to be read."""
    experts = kind_of(layer).experts
    routed = layer.get_submodule(experts) if experts else None
    if isinstance(routed, VisitedExperts) and name.startswith(f"{experts}."):
        return linear_of(routed.pattern, routed.inside(name.removeprefix(f"{experts}."))).out_features
    return linear_of(layer, name).out_features


def _fold_linear(layer: nn.Module, state: Waiting, states: list[Waiting]) -> None:
    """Search a group's scale for each method that scales, multiply its columns, and divide the linear before it."""
    fold = state.group.fold
    if fold is None or fold.norm:
        return  # done already
    owner = next((other for other in states if fold.producer in other.group.linears), None)
    if owner is None:
        return  # the linear before it is not quantized and is left alone
    spread = fold.spread
    for method in state.plan.input_scalers:
        cost = state.plan.quantizer.cost(state.hessian)
        part = SitePart(state.weight, state.plan.scheme, cost)
        site = Site([part], lambda channels: tied(channels, spread), state.inputs)
        choice = method.input_scale(site)
        if choice is None:
            continue
        scale = tied(choice.scale, spread)
        divisor = divisor_of(fold, scale)
        _divide_rows(layer, fold, owner, divisor)
        before = state.producer_divisor
        state.producer_divisor = divisor if before is None else before * divisor
        state.scale_columns(InputScale(scale, choice.alpha))


def _divide_rows(layer: nn.Module, fold: Fold, owner: Waiting, divisor: Tensor) -> None:
    """Divide output channels of a linear, whose weight waits in `owner` to be quantized, and its bias."""
    names = owner.group.linears
    first = sum(linear_of(layer, name).out_features for name in names[: names.index(fold.producer)])
    rows = fold.spread.channels().to(divisor.device)
    owner.weight[first + rows] /= divisor.unsqueeze(1)
    divide_bias(linear_of(layer, fold.producer), rows, divisor)


def _product(first: InputScale, second: InputScale) -> InputScale:
    return InputScale(first.scale * second.scale, second.alpha)


def _install(layer: nn.Module, state: Waiting, quantized: Quantized) -> Iterator[tuple[str, QuantizedLinear]]:
    """Split a stacked result back into its linears and give the layer the weights that will be served."""
    start = 0
    for name in state.group.linears:
        linear = linear_of(layer, name)
        stop = start + linear.weight.shape[0]
        part = quantized.rows(start, stop)
        served = part.dequantize()
        original = state.weight[start:stop]
        error = _relative_error(original, served, state.hessian)
        _serve(layer, name, linear, part, served)
        yield name, QuantizedLinear(part, state.folded.alpha if state.folded else None, error)
        start = stop


def _relative_error(original: Tensor, served: Tensor, hessian: Tensor) -> float:
    """The mean squared error of outputs over their mean square, of `REPORT_ROWS` of them or a few more."""
    some = slice(None, None, max(1, len(original) // REPORT_ROWS))
    with exact_products(torch.bfloat16):  # not exact here: three digits are enough for a report
        power = output_error(original[some], hessian).clamp(min=1e-30)
        return float(output_error(original[some] - served[some], hessian) / power)


def _serve(layer: nn.Module, name: str, linear: nn.Linear, part: Quantized, served: Tensor) -> None:
    """Let a layer compute with what engines compute with."""
    quantizer = part.scheme.input_quantizer
    if quantizer is None:
        linear.weight = nn.Parameter(served.to(linear.weight.dtype), requires_grad=False)
    else:
        layer.set_submodule(name, RoundingLinear(linear, *part.factors(), quantizer, part.input_scale))
