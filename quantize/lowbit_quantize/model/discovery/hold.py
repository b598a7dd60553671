"""Folds held against the model itself: at real widths, with its weights, on the first layer of each kind, in float32.

Routed experts are not there but for two of them, which are held by themselves: what all of them read is compared where
they are called. So a mixture needs no more memory than its attention, its router and its shared expert.
"""

import copy
from collections import UserDict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lowbit_quantize.model.architecture import LayerKind, LinearGroup, kind_of, set_kind
from lowbit_quantize.model.decoder import Decoder
from lowbit_quantize.model.discovery.folds import FoundFold, moved
from lowbit_quantize.model.discovery.probe import ProbedLayer
from lowbit_quantize.model.discovery.twin import Call
from lowbit_quantize.model.experts.linears import ExpertList

TOKENS = 64
HOLDS = 1e-3  # relative: what float32 and factors over three decades move
EXPERTS = 2


def drop_broken_folds(decoder: Decoder, index: int) -> list[str]:
    """Hold the folds of a layer's kind; those that fail are taken out of all its layers. Returns a line for each.

    The kind is held on its first layer, whichever of them is given, so that a run that goes on decides alike.
    """
    kinds = decoder.architecture.kinds
    first = kinds.index(kinds[index])
    errors = dict(_errors(decoder, first, kinds[first]))
    broken = {producer: error for producer, error in errors.items() if not error < HOLDS}
    if broken:
        kept = replace(kinds[first], groups=tuple(_without(group, broken) for group in kinds[first].groups))
        for number, kind in enumerate(kinds):
            if kind == kinds[first]:
                set_kind(decoder.layer(number), kept)
    return [
        f"{producer} of layers like {first}: the layer's output moves by {error:.1g}"
        for producer, error in broken.items()
    ]


def _without(group: LinearGroup, broken: dict[str, float]) -> LinearGroup:
    return replace(group, fold=None) if group.fold and group.fold.producer in broken else group


def _errors(decoder: Decoder, index: int, kind: LayerKind) -> Iterator[tuple[str, float]]:
    """By producer, how far the output moves when its folds are made over three decades."""
    rows = decoder.embed(_some_ids(decoder)).float()  # first: the embedding is gone before the layer comes
    layer, stream = _load(decoder, index), decoder.architecture.stream
    hidden, args, kwargs = _on_cpu(decoder.call(index, rows))
    call = Call(layer, hidden, args, kwargs, kind.outputs, stream.left if kind.leaves else "", stream)
    probed = ProbedLayer(call, 1, hidden)
    yield from _held(probed, kind.groups, "")
    if not kind.experts:
        return
    given = probed.base.inputs[kind.experts]
    for number in range(EXPERTS):
        expert = decoder.load_part(index, f"{kind.experts}.{number}").float().cpu()
        groups = [group for group in kind.groups if kind.is_expert(group)]
        yield from _held(ProbedLayer(Call(expert, given, (), {}, 0), 1, given), groups, f"{kind.experts}.*.")


def _load(decoder: Decoder, index: int) -> nn.Module:
    """A layer in float32 on the CPU, without its routed experts."""
    layer = copy.deepcopy(decoder.layer(index))
    if experts := kind_of(layer).experts:
        layer.set_submodule(experts, ExpertList())
    return decoder.load_into(layer, index).float().cpu()


def _on_cpu(value: Any) -> Any:
    """Arguments of a layer, wherever they were made; in the place of what earlier layers leave, seeded numbers."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(one) for key, one in value.items()}
    if isinstance(value, UserDict):
        return UserDict({key: tuple(map(_seeded, left)) for key, left in value.items()})
    return type(value)(map(_on_cpu, value)) if isinstance(value, tuple | list) else value


def _seeded(like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(13))


def _some_ids(decoder: Decoder) -> torch.Tensor:
    words = int(decoder.config.get_text_config().vocab_size)
    return torch.randint(words, (1, TOKENS), generator=torch.Generator().manual_seed(11))


def _held(layer: ProbedLayer, groups: Iterable[LinearGroup], prefix: str) -> Iterator[tuple[str, float]]:
    """Each producer whose name begins so, and how far its folds move the layer."""
    by_producer: dict[str, list[FoundFold]] = {}
    for group in groups:
        fold = group.fold
        if fold is None or not fold.producer.startswith(prefix) or "*" in fold.producer.removeprefix(prefix):
            continue
        readers = tuple(name.removeprefix(prefix) for name in (*group.linears, *group.other_readers))
        inside = replace(fold, producer=fold.producer.removeprefix(prefix))
        by_producer.setdefault(fold.producer, []).append(FoundFold(inside, readers))
    for producer, folds in by_producer.items():
        yield producer, moved(layer, folds)
