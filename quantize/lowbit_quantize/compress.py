"""One layer, compressed: scales folded into what comes before, weights rounded, results put back for the next step.

Everything here is arithmetic on the layer's weights and on what `observe` saw; no forward pass. First each norm
takes the scale of all that reads it; then each chain of linears, attention's or one network's, is folded and
rounded by itself, so that the float32 copies of one expert are alive at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_core.errors import NumericsError
from lowbit_quantize.architectures import Architecture, LinearGroup, linear_of
from lowbit_quantize.awq import ScaleChoice, search_scale
from lowbit_quantize.clip import round_clipped
from lowbit_quantize.gptq import remaining_variance, round_gptq
from lowbit_quantize.grid import GridSpec, Rounded, output_error, range_grid, round_to_grid
from lowbit_quantize.observe import LayerStatistics
from lowbit_quantize.precision import exact_products

SITE_ROWS = 4096  # rows, over all its readers, that the scale of a norm is searched on


def _round_to_nearest(weight: Tensor, _: Tensor, spec: GridSpec) -> Rounded:
    return round_to_grid(weight, *range_grid(weight, spec), spec)


# Each rounds a weight (out, in) on inputs of a covariance (in, in); methods named awq fold scales first.
ROUND: dict[str, Callable[[Tensor, Tensor, GridSpec], Rounded]] = {
    "rtn": _round_to_nearest,
    "awq": round_clipped,
    "gptq": round_gptq,
    "awq+gptq": round_gptq,
}


@dataclass(frozen=True)
class CompressedLinear:
    """A rounded linear, its AWQ exponent, and its relative squared output error."""

    rounded: Rounded
    alpha: float | None
    error: float


@dataclass(frozen=True)
class ColumnScale:
    """What the inputs of some linears were divided by, (features,), and the exponent that it came from."""

    scale: Tensor
    alpha: float


@dataclass
class CompressedLayer:
    """The rounded linears by name, and what each cached value channel was divided by.

    `folded` holds, by first linear, the scales of groups that are rounded in a later stage, where the linear before
    is divided already.
    """

    linears: dict[str, CompressedLinear] = field(default_factory=dict)
    value_divisor: Tensor | None = None
    folded: dict[str, ColumnScale] = field(default_factory=dict)


@dataclass
class _GroupState:
    """A group's weights (stacked), covariance and column scale, on the way to being rounded."""

    group: LinearGroup
    weight: Tensor
    covariance: Tensor
    folded: ColumnScale | None = None
    producer_divisor: Tensor | None = None


def compress_layer(
    layer: nn.Module,
    architecture: Architecture,
    statistics: LayerStatistics,
    spec: GridSpec,
    method: str,
    ignored: frozenset[str] = frozenset(),
    stage: Sequence[LinearGroup] | None = None,
    done: CompressedLayer | None = None,
) -> CompressedLayer:
    """Round linears of a layer in place, all or those of a `stage`; returns what to store for each, by name.

    `statistics` are of the stage and of what `folded_later` says. Results are added to `done`, which holds those of
    earlier stages. Raises NumericsError on a weight that is not finite.
    """
    groups, done = architecture.groups_of(layer), done or CompressedLayer()
    now = [group for group in (groups if stage is None else stage) if not ignored.intersection(group.linears)]
    later = folded_later(groups, now, method, ignored)
    norms: dict[str, ColumnScale] = {}
    if method.startswith("awq"):
        for norm in dict.fromkeys(group.fold_into for group in now if group.fold == "norm"):
            readers = [group for group in groups if group.fold_into == norm and group.fold == "norm"]
            norms[norm] = _fold_norm(layer, architecture, readers, now, statistics, spec, method)
    for chain in _chains([*now, *later]):
        states = [_state_of(layer, group, statistics, norms.get(group.fold_into), done) for group in chain]
        if method.startswith("awq"):
            for state in states:
                _fold_linear(layer, architecture, state, states, spec, method)
        for state in states:
            if state.group.fold == "kv_rows" and state.producer_divisor is not None:
                done.value_divisor = state.producer_divisor
            if state.group in later:
                done.folded.update({state.group.linears[0]: state.folded} if state.folded else {})
                continue
            done.linears.update(_install(layer, state, ROUND[method](state.weight, state.covariance, spec)))
    return done


def folded_later(
    groups: Sequence[LinearGroup], stage: Sequence[LinearGroup], method: str, ignored: frozenset[str]
) -> list[LinearGroup]:
    """Groups of later stages whose AWQ scale folds into a linear of this one: it is chosen before that is rounded."""
    if not method.startswith("awq"):
        return []
    producers = {name for group in stage for name in group.linears}
    return [
        group
        for group in groups
        if group.fold_into in producers and group not in stage and not ignored.intersection(group.linears)
    ]


def _chains(groups: Sequence[LinearGroup]) -> list[list[LinearGroup]]:
    """Groups in runs: one whose scale folds into a linear joins the run that the linear is in."""
    chains: list[list[LinearGroup]] = []
    run_of: dict[str, list[LinearGroup]] = {}
    for group in groups:
        chain = run_of.get(group.fold_into)
        if chain is None:
            chain = []
            chains.append(chain)
        chain.append(group)
        run_of.update(dict.fromkeys(group.linears, chain))
    return chains


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
    norm: ColumnScale | None,
    done: CompressedLayer,
) -> _GroupState:
    covariance = statistics.covariance(group)
    weight, folded = _weight_of(layer, group), done.folded.get(group.linears[0])
    if folded is not None:  # its inputs are divided already
        weight = weight * folded.scale
    state = _GroupState(group, statistics.target(group, weight, covariance), covariance, folded)
    if norm is not None:
        _scale_columns(state, norm)
    return state


def _scale_columns(state: _GroupState, folded: ColumnScale) -> None:
    state.weight = state.weight * folded.scale
    state.covariance = state.covariance / torch.outer(folded.scale, folded.scale)
    state.folded = folded


def _fold_norm(
    layer: nn.Module,
    architecture: Architecture,
    readers: Sequence[LinearGroup],
    active: Sequence[LinearGroup],
    statistics: LayerStatistics,
    spec: GridSpec,
    method: str,
) -> ColumnScale:
    """Search one scale for all groups that read a norm and divide the norm by it.

    What reads the norm and is not rounded (a router, an ignored linear) is multiplied in its own dtype: the scale
    is then of powers of two, so that it computes bit for bit what it did.
    """
    rounded = [group for group in readers if group in active]
    rows = sum(linear_of(layer, name).out_features for group in rounded for name in group.linears)
    step = 1 if len(rounded) == 1 else max(1, -(-rows // SITE_ROWS))
    weight = torch.cat([_weight_of(layer, group, step) for group in rounded])
    covariance = statistics.joint_covariance(rounded)
    curvature = _curvature(covariance, method)
    choice = search_scale(weight, curvature, _activation(curvature), spec)
    beside = {name for group in readers for name in group.beside}
    beside.update(name for group in readers if group not in active for name in group.linears)
    scale = choice.scale.log2().round().exp2() if beside else choice.scale
    norm = layer.get_submodule(readers[0].fold_into)
    scale = _divide_norm(norm, scale, architecture.norm_offset)
    for name in beside:
        module: Any = layer.get_submodule(name)
        widened = (module.weight.float() * scale).to(module.weight.dtype)
        module.weight = nn.Parameter(widened, requires_grad=False)
    return ColumnScale(scale, choice.alpha)


def _fold_linear(
    layer: nn.Module,
    architecture: Architecture,
    state: _GroupState,
    states: list[_GroupState],
    spec: GridSpec,
    method: str,
) -> None:
    """Search a group's scale, multiply its columns by it, and divide the linear before it."""
    group = state.group
    owner = next((other for other in states if group.fold_into in other.group.linears), None)
    if group.fold == "norm" or owner is None:
        return  # done already, or the linear before it is not quantized and is left alone
    heads = (1, 1)
    if group.fold == "kv_rows":
        attention: Any = layer.get_submodule(architecture.attention)
        if getattr(attention.config, "clip_qkv", None) is not None:
            return  # values are clamped between the two linears: dividing them would change the function
        repeats = attention.num_key_value_groups
        heads = (state.weight.shape[1] // (repeats * attention.head_dim), repeats)
    curvature = _curvature(state.covariance, method)
    activation = _shared_by_heads(_activation(curvature), heads)
    choice: ScaleChoice = search_scale(state.weight, curvature, activation, spec)
    scale = _shared_by_heads(choice.scale, heads)
    state.producer_divisor = scale.view(*heads, -1)[:, 0].flatten()  # once for each channel of the producer
    _divide_rows(layer, group.fold_into, owner, state.producer_divisor)
    _scale_columns(state, ColumnScale(scale, choice.alpha))


def _curvature(covariance: Tensor, method: str) -> Tensor:
    """What an error costs, (in, in) or its diagonal (in,): with GPTQ, what later columns cannot make up for."""
    return remaining_variance(covariance) if "gptq" in method else covariance


def _activation(curvature: Tensor) -> Tensor:
    """Root mean square of each input, (in,)."""
    diagonal = curvature if curvature.dim() == 1 else curvature.diagonal()
    return diagonal.clamp(min=0).sqrt()


def _divide_rows(layer: nn.Module, producer: str, owner: _GroupState, divisor: Tensor) -> None:
    """Divide the last output channels of a linear, whose weight waits in `owner` to be rounded, and its bias."""
    names = owner.group.linears
    stop = sum(linear_of(layer, name).out_features for name in names[: names.index(producer) + 1])
    owner.weight[stop - len(divisor) : stop] /= divisor.unsqueeze(1)
    linear = linear_of(layer, producer)
    if linear.bias is not None:
        bias = linear.bias.float()
        bias[-len(divisor) :] /= divisor
        linear.bias = nn.Parameter(bias.to(linear.bias.dtype), requires_grad=False)


def _divide_norm(norm: Any, scale: Tensor, offset: float) -> Tensor:
    """Divide what a norm multiplies by; what its dtype rounds away is put into the scale, so nothing is lost."""
    before = norm.weight.float() + offset
    stored = (before / scale - offset).to(norm.weight.dtype)
    after = stored.float() + offset
    usable = (after != 0) & torch.isfinite(after) & (before != 0)
    norm.weight = nn.Parameter(torch.where(usable, stored, norm.weight), requires_grad=False)
    return torch.where(usable, before / after, torch.ones_like(scale))


def _shared_by_heads(channels: Tensor, heads: tuple[int, int]) -> Tensor:
    """Replace each channel of the query heads that share a value channel by their geometric mean."""
    if heads[1] == 1:
        return channels
    grouped = channels.view(heads[0], heads[1], -1).clamp(min=1e-8).log()  # (kv_heads, repeats, head_dim)
    return grouped.mean(1, keepdim=True).exp().expand(-1, heads[1], -1).flatten()


def _install(layer: nn.Module, state: _GroupState, rounded: Rounded) -> dict[str, CompressedLinear]:
    """Split a stacked result back into its linears and give the layer the weights that will be served."""
    results = {}
    start = 0
    for name in state.group.linears:
        linear = linear_of(layer, name)
        stop = start + linear.weight.shape[0]
        part = Rounded(
            rounded.codes[start:stop], rounded.scale[start:stop], rounded.zero[start:stop], rounded.spec
        )
        served = part.dequantize()
        original = state.weight[start:stop]
        with exact_products(torch.bfloat16):  # not exact here: three digits are enough for a report
            power = output_error(original, state.covariance).clamp(min=1e-30)
            error = float(output_error(original - served, state.covariance) / power)
        linear.weight = nn.Parameter(served.to(linear.weight.dtype), requires_grad=False)
        results[name] = CompressedLinear(part, state.folded.alpha if state.folded else None, error)
        start = stop
    return results
