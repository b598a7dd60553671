"""Folds of a layer, found by scaling: what a producer's channels feed, and whether the layer's output stays.

A producer's channels are multiplied by random factors. Columns of what linears read that then scale by exactly one of
these factors, or by its square, are fed by that channel. What is found counts only if dividing the columns by factors
over three decades leaves the layer's output as it was: clamps, and readers that are no linears, show then.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_quantize.model.architecture import Fold
from lowbit_quantize.model.discovery.probe import ProbedLayer, Seen
from lowbit_quantize.model.spread import spread_of

EXACT = 2e-4  # relative difference of what is the same
DECADES = 3
POWERS = (1, 2)


@dataclass(frozen=True)
class FoundFold:
    """A fold, and all who read what it scales."""

    fold: Fold
    readers: tuple[str, ...]


@dataclass(frozen=True)
class _Map:
    """Channels by column, −1 where none is followed; columns that did not move are in `still`."""

    channels: Tensor
    power: int
    still: Tensor

    @property
    def complete(self) -> bool:
        return bool((self.channels >= 0).all())


def find_folds(layer: ProbedLayer, inputs: Mapping[str, Sequence[str]]) -> tuple[list[FoundFold], list[str]]:
    """Folds that hold, and a line for each that does not; `inputs` has by name all who read what a module reads."""
    found, refused = [], []
    for name in layer.names:
        if layer.expert_of(name) not in ("", layer.first_expert):
            continue  # experts are alike
        offset = _offset(layer, name)
        if offset is None:
            continue
        folds = _of_producer(layer, name, offset, inputs)
        if not folds:
            continue
        error = moved(layer, folds)
        if error < EXACT:
            found += folds
        else:
            readers = ", ".join(reader for fold in folds for reader in fold.readers[:1])
            refused.append(f"{name} to {readers}: the layer's output moves by {error:.1g}")
    return found, refused


def _offset(layer: ProbedLayer, name: str) -> float | None:
    """What a producer adds to its weight before it multiplies: 0 or 1; None of what does not multiply by a weight."""
    weight = layer.own_weight(name)
    if weight is None or name not in layer.base.outputs or weight.dim() not in (1, 2):
        return None
    before = layer.base.outputs[name]
    if before.shape[-1] != len(weight):
        return None
    if weight.dim() == 2:
        return 0.0 if isinstance(layer.module.get_submodule(name), nn.Linear) else None
    bias = getattr(layer.module.get_submodule(name), "bias", None)
    rest = before if bias is None else before - bias
    for offset in (0.0, 1.0):
        with _scaled(layer, name, torch.full((len(weight),), 2.0), offset, bias=False):
            after = layer.run().outputs[name]
        if _near(after - before, rest):
            return offset
    return None


def _of_producer(
    layer: ProbedLayer, name: str, offset: float, inputs: Mapping[str, Sequence[str]]
) -> list[FoundFold]:
    weight = layer.own_weight(name)
    assert weight is not None
    rows, norm = len(weight), weight.dim() == 1
    factors = _factors(rows)
    maps = {place: one for place, one in _maps(layer, name, offset, factors, inputs).items() if one.complete}
    if not maps and not norm:
        maps = _by_blocks(layer, name, inputs)
    folds = []
    for place, one in maps.items():
        spread = spread_of(one.channels, rows)
        if spread is not None:
            fold = Fold(name, spread, norm, offset, one.power)
            folds.append(FoundFold(fold, tuple(inputs[place])))
    return folds


def _maps(
    layer: ProbedLayer, name: str, offset: float, factors: Tensor, inputs: Mapping[str, Sequence[str]]
) -> dict[str, _Map]:
    with _scaled(layer, name, factors, offset):
        after = layer.run()
    expert = layer.expert_of(name)
    found = {}
    for place in inputs:
        if layer.expert_of(place) not in ("", expert) or place not in after.inputs or place == name:
            continue
        one = _map(layer.base.inputs[place], after.inputs[place], factors)
        if one is not None:
            found[place] = one
    return found


def _map(before: Tensor, after: Tensor, factors: Tensor) -> _Map | None:
    """For each column the channel whose factor it follows."""
    if before.shape != after.shape:
        return None
    one, other = before.reshape(-1, before.shape[-1]).double(), after.reshape(-1, after.shape[-1]).double()
    ratio = (one * other).sum(0) / one.square().sum(0).clamp(min=1e-30)
    exact = (other - one * ratio).norm(dim=0) <= EXACT * other.norm(dim=0).clamp(min=1e-12)
    still = exact & ((ratio - 1).abs() < EXACT)
    moving = torch.where(factors != 1)[0]
    best, power = torch.full((len(ratio),), -1), 1
    for exponent in POWERS:
        nearest, off = _nearest(ratio, factors[moving].double().pow(exponent))
        channels = torch.where(exact & (off < EXACT), moving[nearest], -1)
        if (channels >= 0).sum() > (best >= 0).sum():
            best, power = channels, exponent
    dead = (one.norm(dim=0) == 0) & (other.norm(dim=0) == 0)
    for column in torch.nonzero(dead).flatten().tolist():  # on these tokens: follows its neighbour
        best[column] = best[column - 1] + 1 if column and best[column - 1] >= 0 else -1
    return _Map(best, power, still) if (best >= 0).any() else None


def _nearest(values: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """For each value the number of the size that is nearest, and the relative distance."""
    rising, order = sizes.sort()
    above = torch.searchsorted(rising, values).clamp(max=len(sizes) - 1)
    both = torch.stack((above, (above - 1).clamp(min=0)))
    off, which = (values / rising[both] - 1).abs().min(0)
    return order[both.gather(0, which.unsqueeze(0)).squeeze(0)], off


def _factors(rows: int) -> Tensor:
    """Factors that are all apart, in no order."""
    return 1.3 + torch.randperm(rows, generator=torch.Generator().manual_seed(1)) / rows


def _by_blocks(layer: ProbedLayer, name: str, inputs: Mapping[str, Sequence[str]]) -> dict[str, _Map]:
    """Maps of what some rows only feed one to one: a fused projection's values, say. Rows are tried in blocks."""
    weight = layer.own_weight(name)
    assert weight is not None
    rows = len(weight)
    channels = {
        place: torch.full((layer.base.inputs[place].shape[-1],), -1)
        for place in inputs
        if place in layer.base.inputs
    }
    random = _factors(rows)
    size = layer.block_rows
    for start in range(0, rows, size):
        factors = torch.ones(rows)
        factors[start : start + size] = random[start : start + size]
        for place, one in _maps(layer, name, 0.0, factors, inputs).items():
            follows = one.channels >= 0
            if one.power == 1 and bool((follows | one.still).all()):
                channels[place][follows] = one.channels[follows]
    return {place: _Map(index, 1, index < 0) for place, index in channels.items() if bool((index >= 0).all())}


def moved(layer: ProbedLayer, folds: Sequence[FoundFold]) -> float:
    """How far the layer's output moves when all folds of one producer are made at once, relative to what it adds.

    Readers that are not there are left out; what routed experts are given is compared then.
    """
    first = folds[0].fold
    weight = layer.own_weight(first.producer)
    assert weight is not None
    factors = torch.ones(len(weight))
    wide = 10 ** (DECADES * (torch.rand(len(weight), generator=torch.Generator().manual_seed(2)) - 0.5))
    for one in folds:
        channels = one.fold.spread.channels()
        factors[channels] = wide[channels]
    undo: dict[str, nn.Parameter] = {}
    with _scaled(layer, first.producer, factors, first.offset):
        for one in folds:
            columns = one.fold.spread.by_column(factors).pow(one.fold.power)
            for reader in one.readers:
                if reader in undo or reader not in layer.names:
                    continue
                module: Any = layer.module.get_submodule(reader)
                undo[reader] = module.weight
                module.weight = nn.Parameter(module.weight / columns, requires_grad=False)
        after = layer.run()
        for reader, before in undo.items():
            layer.module.get_submodule(reader).weight = before
    added = layer.base.output
    if added.shape == layer.hidden.shape and not torch.equal(added, layer.hidden):
        added = added - layer.hidden
    error = float((after.output - layer.base.output).norm() / added.norm().clamp(min=1e-12))
    for left, other in zip(layer.base.left, after.left, strict=True):  # what later layers will read
        error = max(error, float((other - left).norm() / left.norm().clamp(min=1e-12)))
    if layer.experts and not len(layer.module.get_submodule(layer.experts)):  # type: ignore[arg-type]
        error = max(error, _routed_error(layer, folds, after, factors))
    return error


def _routed_error(layer: ProbedLayer, folds: Sequence[FoundFold], after: Seen, factors: Tensor) -> float:
    """How far off what absent experts are given is, by the fold that they read."""
    read, given = layer.base.inputs[layer.experts], after.inputs[layer.experts]
    for one in folds:
        if any(reader.startswith(f"{layer.experts}.") for reader in one.readers):
            given = given / one.fold.spread.by_column(factors).pow(one.fold.power)
            break
    return float((given - read).norm() / read.norm().clamp(min=1e-12))


@contextmanager
def _scaled(
    layer: ProbedLayer, name: str, factors: Tensor, offset: float, *, bias: bool = True
) -> Iterator[None]:
    """Multiply a producer's output channels while the block runs."""
    module: Any = layer.module.get_submodule(name)
    kept = {"weight": module.weight} | (
        {"bias": module.bias} if bias and getattr(module, "bias", None) is not None else {}
    )
    for key, parameter in kept.items():
        if key == "weight" and parameter.dim() == 1:
            value = (parameter + offset) * factors - offset
        else:
            value = parameter * (factors if parameter.dim() == 1 else factors.unsqueeze(1))
        setattr(module, key, nn.Parameter(value, requires_grad=False))
    try:
        yield
    finally:
        for key, parameter in kept.items():
            setattr(module, key, parameter)


def _near(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= 1e-3 * other.norm().clamp(min=1e-12))
