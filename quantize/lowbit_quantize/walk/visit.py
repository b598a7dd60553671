"""The visit: the experts of a layer one after the other, or some at a time, each for all streams at once.

A stream runs through the layer with a recorder in place of the experts, which costs attention, router and shared
experts. Then each expert is read once: every stream's tokens go through it as it is in the base model or as it is
served, and what it gives is added up. At last the stream runs through the layer again with the sums in the experts'
place. Where a layer has a middle, attention is computed once: hidden states wait there.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_quantize.model.architecture import kind_of
from lowbit_quantize.model.decoder import Decoder
from lowbit_quantize.model.hooks import KVCacheHook, without_attention
from lowbit_quantize.model.visited_experts import RoutedCall, VisitedExperts

ROWS = 8192  # of an expert's tokens that go through it at once


@dataclass
class Traveller:
    """A stream and the layer that it goes through: the base model's, or the compressed one with its cache's hook.

    `halfway`: its hidden states are what the layer's middle reads. `read_on`: somebody reads what the layer gives.
    """

    hidden: Tensor
    layer: nn.Module
    hook: KVCacheHook | None = None
    compressed: bool = False
    halfway: bool = False
    read_on: bool = True
    lengths: list[int] = field(default_factory=list)  # tokens of each call
    call: RoutedCall | None = None  # all of them as one
    total: Tensor | None = None  # what experts have given so far, (tokens, hidden), float32

    @property
    def called(self) -> RoutedCall:
        """What the experts are called with."""
        assert self.call is not None, "a stream is recorded before its experts are visited"
        return self.call

    def record(self, decoder: Decoder, index: int) -> None:
        """Run to the experts and note what they are called with."""
        kind = kind_of(self.layer)
        if kind.middle and not self.halfway:
            decoder.advance_to(kind.middle, self.layer, index, self.hidden, self.hook)
            self.halfway = True
        with experts_of(self.layer).recording() as calls, self._on_its_way():
            for _ in decoder.run_layer(self.layer, index, self.hidden, self.hook):
                pass
        self.lengths = [len(call.hidden) for call in calls]
        self.call = RoutedCall(*(torch.cat(parts) for parts in zip(*map(_parts, calls), strict=True)))
        self.total = torch.zeros_like(self.call.hidden, dtype=torch.float32)

    def add(self, number: int, expert: nn.Module) -> None:
        """Let an expert see its tokens."""
        if not self.read_on:
            return
        assert self.total is not None
        tokens, gates = self.called.of(number)
        for rows, share in zip(tokens.split(ROWS), gates.split(ROWS), strict=True):
            if len(rows):
                given = expert(self.called.hidden[rows]) * share.unsqueeze(-1)
                self.total.index_add_(0, rows, given.float())

    def play(self, decoder: Decoder, index: int) -> None:
        """Run to the layer's end."""
        if not self.read_on:
            return
        assert self.total is not None
        outputs = self.total.to(self.called.hidden.dtype).split(self.lengths)
        self.call = self.total = None
        with experts_of(self.layer).playing(outputs), self._on_its_way():
            decoder.advance(self.layer, index, self.hidden, self.hook)

    def _on_its_way(self) -> Any:
        kind = kind_of(self.layer)
        if not self.halfway or not kind.attention:
            return nullcontext()
        return without_attention(self.layer, kind.attention, kind.attention_end, kind.attention_outputs)


def experts_of(layer: nn.Module) -> VisitedExperts:
    """The experts of a routed layer that was loaded without them."""
    found = layer.get_submodule(kind_of(layer).experts)
    assert isinstance(found, VisitedExperts), "the layer was loaded with its experts"
    return found


@contextmanager
def silent_experts(*layers: nn.Module) -> Iterator[None]:
    """The routed experts of these layers, if any, give zeros while the block runs."""
    with ExitStack() as stack:
        for layer in layers:
            if kind_of(layer).experts:
                stack.enter_context(experts_of(layer).silent())
        yield


def visit(
    decoder: Decoder,
    index: int,
    travellers: Sequence[Traveller],
    ours: VisitedExperts,
    serve: Callable[[Mapping[int, nn.Module]], None],
    together: int = 1,
) -> None:
    """Take all travellers from where they are to the layer's end.

    `ours` are the compressed layer's experts; `serve` gets up to `together` of them at a time, by their numbers there,
    and leaves in them what is served. Each is read once: the base model's travellers see it before it is changed.
    """
    for one in travellers:
        one.record(decoder, index)
    place = {number: here for here, number in enumerate(ours.numbers)}
    kind = decoder.architecture.kinds[index]
    count = len(decoder.layer(index).get_submodule(kind.experts))  # type: ignore[arg-type]
    base, compressed = ([one for one in travellers if one.compressed == whose] for whose in (False, True))
    waiting: dict[int, nn.Module] = {}
    with torch.no_grad():
        for number in range(count):
            expert = decoder.load_part(index, f"{kind.experts}.{number}")
            _let_base_see(expert, number, base)
            if number in place:
                waiting[place[number]] = ours.take(place[number], expert)
            if waiting and (len(waiting) == together or number == count - 1):
                serve(waiting)
                for here, one in itertools.product(waiting, compressed):
                    one.add(here, ours[here])
                ours.let_go()
                waiting = {}
    for one in travellers:
        one.play(decoder, index)


def _let_base_see(expert: nn.Module, number: int, travellers: Sequence[Traveller]) -> None:
    wide: nn.Module | None = None
    for one in travellers:
        if one.hidden.dtype == torch.float32 and next(expert.parameters()).dtype != torch.float32:
            wide = wide or copy.deepcopy(expert).float()
            one.add(number, wide)
        else:
            one.add(number, expert)


def advance(
    decoder: Decoder, layer: nn.Module, index: int, hidden: Tensor, hook: KVCacheHook | None = None
) -> None:
    """Replace `hidden` by the layer's output, in place, each expert that the layer has read once."""
    if not kind_of(layer).experts or not isinstance(
        layer.get_submodule(kind_of(layer).experts), VisitedExperts
    ):
        decoder.advance(layer, index, hidden, hook)
        return
    one, experts = Traveller(hidden, layer, hook), experts_of(layer)
    one.record(decoder, index)
    with torch.no_grad():
        for number, expert in enumerate(experts):
            one.add(number, expert)
    experts.let_go()
    one.play(decoder, index)


def _parts(call: RoutedCall) -> tuple[Tensor, Tensor, Tensor]:
    return call.hidden, call.chosen, call.gates
