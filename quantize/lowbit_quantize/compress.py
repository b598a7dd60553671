"""One decoder layer: fold AWQ scales, round every linear, and put back the weights that will be served.

Everything here is arithmetic on the layer's weights and on what `observe` saw; no forward pass.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_core.errors import NumericsError
from lowbit_quantize.architectures import Architecture, LinearGroup, linear_of
from lowbit_quantize.awq import search_scale
from lowbit_quantize.clip import round_clipped
from lowbit_quantize.gptq import round_gptq
from lowbit_quantize.grid import GridSpec, Rounded, output_error, range_grid, round_to_grid
from lowbit_quantize.observe import Covariance
from lowbit_quantize.precision import exact_products


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
class CompressedLayer:
    """The rounded linears by name, and what each value channel, (kv_heads · head_dim,), was divided by."""

    linears: dict[str, CompressedLinear]
    value_divisor: Tensor | None


@dataclass
class _GroupState:
    """A group's weights (stacked), covariance and chosen exponent, on the way to being rounded."""

    group: LinearGroup
    weight: Tensor
    covariance: Tensor
    alpha: float | None = None
    producer_divisor: Tensor | None = None


def compress_layer(
    layer: nn.Module,
    architecture: Architecture,
    statistics: Mapping[str, Covariance],
    spec: GridSpec,
    method: str,
    ignored: frozenset[str] = frozenset(),
) -> CompressedLayer:
    """Round the linears of a layer in place; returns what to store for each, by name within the layer.

    `statistics` is keyed by the first linear of each group. Raises NumericsError on a weight that is not finite.
    """
    states = [_state_of(layer, group, statistics, ignored) for group in architecture.groups]
    active = [state for state in states if state is not None]
    if method.startswith("awq"):
        for state in active:
            _fold_awq_scale(layer, state, active, spec)
    results: dict[str, CompressedLinear] = {}
    for state in active:
        results.update(_install(layer, state, ROUND[method](state.weight, state.covariance, spec)))
    divisors = [state.producer_divisor for state in active if state.group.fold == "kv_rows"]
    return CompressedLayer(results, divisors[0] if divisors else None)


def _state_of(
    layer: nn.Module, group: LinearGroup, statistics: Mapping[str, Covariance], ignored: frozenset[str]
) -> _GroupState | None:
    if ignored.intersection(group.linears):
        return None
    weights = [linear_of(layer, name).weight.float() for name in group.linears]
    for name, weight in zip(group.linears, weights, strict=True):
        if not torch.isfinite(weight).all():
            raise NumericsError(f"the weight {name} of the base model holds values that are not finite")
    return _GroupState(group, torch.cat(weights), statistics[group.linears[0]].matrix())


def _fold_awq_scale(layer: nn.Module, state: _GroupState, states: list[_GroupState], spec: GridSpec) -> None:
    """Search a group's scale, multiply its columns by it, and divide the operation before it."""
    group = state.group
    owner = next((other for other in states if group.fold_into in other.group.linears), None)
    if group.fold != "norm" and owner is None:
        return  # the linear before it is not quantized and is left alone
    activation, heads = state.covariance.diagonal().clamp(min=0).sqrt(), _value_repeats(layer, group)
    if group.fold == "kv_rows":
        activation = _shared_by_heads(activation, heads)
    choice = search_scale(state.weight, state.covariance, activation, spec)
    scale = choice.scale
    if group.fold == "kv_rows":
        scale = _shared_by_heads(scale, heads)
    if owner is None:
        scale = _divide_norm(layer.get_submodule(group.fold_into), scale)
    else:
        state.producer_divisor = scale.view(*heads, -1)[
            :, 0
        ].flatten()  # once for each channel of the producer
        _divide_rows(layer, group.fold_into, owner, state.producer_divisor)
    state.weight = state.weight * scale
    state.covariance = state.covariance / torch.outer(scale, scale)
    state.alpha = choice.alpha


def _divide_rows(layer: nn.Module, producer: str, owner: _GroupState, divisor: Tensor) -> None:
    """Divide the output channels of a linear, whose weight waits in `owner` to be rounded, and its bias."""
    names = owner.group.linears
    start = sum(linear_of(layer, name).out_features for name in names[: names.index(producer)])
    owner.weight[start : start + len(divisor)] /= divisor.unsqueeze(1)
    linear = linear_of(layer, producer)
    if linear.bias is not None:
        bias = (linear.bias.float() / divisor).to(linear.bias.dtype)
        linear.bias = nn.Parameter(bias, requires_grad=False)


def _divide_norm(norm: Any, scale: Tensor) -> Tensor:
    """Divide a norm's weight; what its storage dtype rounds away is put into the scale, so that nothing is lost."""
    before = norm.weight.float()
    after = (before / scale).to(norm.weight.dtype)
    after = torch.where(
        (after == 0) | ~torch.isfinite(after), norm.weight, after
    )  # not in this dtype's range
    norm.weight = nn.Parameter(after, requires_grad=False)
    return torch.where(after == 0, torch.ones_like(scale), before / after.float())


def _value_repeats(layer: nn.Module, group: LinearGroup) -> tuple[int, int]:
    """(kv heads, query heads for each) of the value projection that a group's scale folds into."""
    if group.fold != "kv_rows":
        return (1, 1)
    attention: Any = layer.get_submodule(group.fold_into.rpartition(".")[0])
    values = linear_of(layer, group.fold_into).out_features
    return values // attention.head_dim, attention.num_key_value_groups


def _shared_by_heads(channels: Tensor, heads: tuple[int, int]) -> Tensor:
    """Replace each channel of the query heads that share a value channel by their geometric mean."""
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
        results[name] = CompressedLinear(part, state.alpha, error)
        start = stop
    return results
