"""What is cut together in a layer: columns of the linear that reads them, and the rows of those that make them.

A slab is found by holding a layer against the same layer of a model whose configuration says smaller sizes: linears
that lose inputs are readers, those beside them that lose outputs make what they read. All that changes must be one of
these, and fit; whatever else changes, nobody here knows how to cut.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowbit_core.errors import RecipeError
from lowbit_quantize.model.architecture import kind_of, linear_of, set_kind
from lowbit_quantize.structure.criteria import Chosen
from lowbit_quantize.structure.surgeon import columns_of

FIRST = ".0."  # of a list of experts, which are all alike


@dataclass(frozen=True)
class Producer:
    """A linear whose rows feed a reader: from each of `starts` on, `rows` of them for each unit."""

    name: str
    starts: tuple[int, ...]
    rows: tuple[int, ...]

    def kept(self, units: Tensor) -> Tensor:
        """Its rows for these units, in the order that it has them."""
        parts = [start + columns_of(units, rows) for start, rows in zip(self.starts, self.rows, strict=True)]
        return torch.cat(parts)


@dataclass(frozen=True)
class Slab:
    """`reader` reads so many `units` of columns, of which `kept` stay; names are relative to the layer, and those of
    experts relative to an expert (`routed`).
    """

    reader: str
    producers: tuple[Producer, ...]
    units: int
    kept: int
    attention: bool = False
    routed: bool = False


def slabs_of(layer: nn.Module, smaller: nn.Module, heads: tuple[int, int]) -> tuple[Slab, ...]:
    """What is cut out of a layer to become the `smaller` one, attention first; `heads` are its key and value heads,
    before and after.

    Raises RecipeError where something else changes with it.
    """
    kind, experts = kind_of(layer), kind_of(layer).experts
    before, after = layer.state_dict(), smaller.state_dict()
    changed = {
        name
        for name, tensor in after.items()
        if (name not in before or tensor.shape != before[name].shape) and not _of_later_expert(name, experts)
    }
    found, seen = [], set[str]()
    for name, (one, other) in _linears(layer, smaller, experts):
        if one.in_features == other.in_features or one.out_features != other.out_features:
            continue
        parent = name.rpartition(".")[0]
        is_attention = bool(kind.attention) and name == kind.attention_end
        units, kept = heads if is_attention else (one.in_features, other.in_features)
        beside = [
            (this, pair)
            for this, pair in _linears(layer, smaller, experts)
            if this.rpartition(".")[0] == parent and pair[0].out_features != pair[1].out_features
        ]
        empty = Slab(name, (), units, kept, is_attention)
        sizes = [(this, (pair[0].out_features, pair[1].out_features)) for this, pair in beside]
        producers = [_producer(*two, empty, one.in_features, alone=len(sizes) == 1) for two in sizes]
        if None in producers or not producers or one.in_features * kept != other.in_features * units:
            raise RecipeError(f"{name} would become {tuple(other.weight.shape)}, which no rows make up")
        slab = replace(empty, producers=tuple(filter(None, producers)))
        seen |= {
            f"{this}.{leaf}"
            for this in (name, *(p.name for p in slab.producers))
            for leaf in ("weight", "bias")
        }
        found.append(_in_expert(slab, experts))
    if rest := sorted(changed - seen):
        raise RecipeError(f"{rest[0]} would change too, of which it is not known what goes")
    return tuple(sorted(found, key=lambda one: not one.attention))


def _of_later_expert(name: str, experts: str) -> bool:
    return bool(experts) and name.startswith(f"{experts}.") and not name.startswith(f"{experts}{FIRST}")


def _linears(
    layer: nn.Module, smaller: nn.Module, experts: str
) -> Iterator[tuple[str, tuple[nn.Linear, nn.Linear]]]:
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and not _of_later_expert(name, experts):
            yield name, (module, linear_of(smaller, name))


def _producer(name: str, rows: tuple[int, int], slab: Slab, columns: int, *, alone: bool) -> Producer | None:
    """A linear that has `rows` before and after, for each unit of a reader of so many columns; None where they do not
    divide so.

    What makes all that attention reads `alone` has queries, keys and values one after the other; what makes more than
    the columns of a network has its gate before the rest.
    """
    before, after = rows
    if before * slab.kept != after * slab.units or before % slab.units:
        return None
    each = before // slab.units
    if not slab.attention:
        return Producer(name, tuple(range(0, before, slab.units)), (1,) * each)
    if not alone:
        return Producer(name, (0,), (each,))
    head = (before - columns) // (2 * slab.units)
    return Producer(name, (0, columns, columns + head * slab.units), (columns // slab.units, head, head))


def _in_expert(slab: Slab, experts: str) -> Slab:
    prefix = f"{experts}{FIRST}"
    if not experts or not slab.reader.startswith(prefix):
        return slab
    inside = tuple(replace(one, name=one.name.removeprefix(prefix)) for one in slab.producers)
    return replace(slab, reader=slab.reader.removeprefix(prefix), producers=inside, routed=True)


def give_biases(module: nn.Module, smaller: nn.Module, slab: Slab) -> None:
    """Zeros where the linears of a slab are to have biases and have none."""
    for name in (slab.reader, *(one.name for one in slab.producers)):
        linear = linear_of(module, name)
        if linear.bias is None and linear_of(smaller, name).bias is not None:
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), requires_grad=False)


def cut(module: nn.Module, slab: Slab, chosen: Chosen) -> None:
    """Cut a layer, or an expert, in place."""
    reader = linear_of(module, slab.reader)
    _give(reader, chosen.weight.to(reader.weight.dtype), None)
    if chosen.bias is not None:
        add_bias(reader, chosen.bias)
    for one in slab.producers:
        producer = linear_of(module, one.name)
        rows = one.kept(chosen.units.to(producer.weight.device))
        bias = None if producer.bias is None else producer.bias[rows].clone()
        _give(producer, producer.weight[rows].clone(), bias)


def add_bias(reader: nn.Linear, gain: Tensor) -> None:
    """Let the bias of a reader, which has one, make up for something."""
    wide = reader.bias.float() + gain
    reader.bias = nn.Parameter(wide.to(reader.bias.dtype), requires_grad=False)


def _give(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.out_features, linear.in_features = weight.shape
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)


def take_sizes(layer: nn.Module, smaller: nn.Module) -> None:
    """Let a layer that was cut count as the `smaller` one does, and fold as it does where its own folds hold."""
    theirs = dict(smaller.named_modules())
    for name, module in layer.named_modules():
        if name in theirs and not isinstance(module, nn.Linear):
            found = vars(theirs[name]).items()
            vars(module).update({key: value for key, value in found if key == "config" or type(value) is int})
    held = {group.linears for group in kind_of(layer).groups if group.fold is not None}
    kind = kind_of(smaller)
    groups = tuple(one if one.linears in held else replace(one, fold=None) for one in kind.groups)
    set_kind(layer, replace(kind, groups=groups))
