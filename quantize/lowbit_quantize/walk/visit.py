"""The visit: the experts of a layer one after the other, or some at a time, each for all streams at once.

A stream runs through the layer with a recorder in place of the experts, which costs attention, router and shared
experts. Then each expert is read once: every stream's tokens go through it as it is in the base model or as it is
served, and what it gives is added up. At last the stream runs through the layer again with the sums in the experts'
place. Where a layer has a middle, attention is computed once: hidden states wait there.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowbit_quantize.device import ranks
from lowbit_quantize.model.architecture import kind_of
from lowbit_quantize.model.decoder import Decoder, batches_of
from lowbit_quantize.model.experts.visited import RoutedCall, VisitedExperts
from lowbit_quantize.model.hooks import KVCacheHook, without_attention

ROWS = 8192  # of an expert's tokens that go through it at once
Made = TypeVar("Made")  # what becomes of some experts
Given = tuple[Tensor, Tensor]  # tokens, (rows,), and what an expert gives for them, (rows, hidden)


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
        with experts_of(self.layer).recording() as own, self._on_its_way():
            for batch in ranks.own(batches_of(self.hidden)):
                for _ in decoder.run_layer(self.layer, index, self.hidden[batch], self.hook):
                    pass
        calls = ranks.in_order(own, decoder.device)
        self.lengths = [len(call.hidden) for call in calls]
        self.call = RoutedCall(*(torch.cat(parts) for parts in zip(*map(_parts, calls), strict=True)))
        self.total = torch.zeros_like(self.call.hidden, dtype=torch.float32)

    def given(self, number: int, expert: nn.Module) -> Iterator[Given]:
        """What an expert gives for its tokens, `ROWS` of them at a time."""
        if not self.read_on:
            return
        tokens, gates = self.called.of(number)
        for rows, share in zip(tokens.split(ROWS), gates.split(ROWS), strict=True):
            if len(rows):
                yield rows, expert(self.called.hidden[rows]) * share.unsqueeze(-1)

    def take(self, given: Iterable[Given]) -> None:
        """Add what an expert gives; experts are taken in their order, whoever has computed them."""
        for rows, outputs in given:
            assert self.total is not None
            self.total.index_add_(0, rows, outputs.float())

    def play(self, decoder: Decoder, index: int) -> None:
        """Run to the layer's end."""
        if not self.read_on:
            return
        assert self.total is not None
        outputs = self.total.to(self.called.hidden.dtype).split(self.lengths)
        self.call = self.total = None
        with experts_of(self.layer).playing(ranks.own(outputs)), self._on_its_way():
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
    make: Callable[[Mapping[int, nn.Module]], Made],
    keep: Callable[[Made], None],
    together: int = 1,
) -> None:
    """Take all travellers from where they are to the layer's end.

    `ours` are the compressed layer's experts; `make` gets up to `together` of them at a time, by their numbers there,
    and leaves in them what is served; `keep` gets what it returns, in the order of experts, on every rank. Each expert
    is read once, by one rank: the base model's travellers see it before it is changed.
    """
    for one in travellers:
        one.record(decoder, index)
    kind = decoder.architecture.kinds[index]
    count = len(decoder.layer(index).get_submodule(kind.experts))  # type: ignore[arg-type]
    place = {number: here for here, number in enumerate(ours.numbers)}

    def pass_by(numbers: Sequence[int], made: list[Made]) -> Iterator[tuple[int, Iterable[Given]]]:
        """What some experts give, by the number of the traveller."""
        waiting: dict[int, nn.Module] = {}
        for number in numbers:
            expert = decoder.load_part(index, f"{kind.experts}.{number}")
            yield from _given_to_base(expert, number, travellers)
            if number in place:
                waiting[place[number]] = ours.take(place[number], expert)
        if waiting:
            made.append(make(waiting))
        for here, (who, one) in itertools.product(waiting, enumerate(travellers)):
            if one.compressed:
                yield who, one.given(here, ours[here])
        ours.let_go()

    chunks = [range(count)[start : start + together] for start in range(0, count, together)]
    with torch.no_grad():
        for first in range(0, len(chunks), ranks.count()):
            _deal(chunks[first : first + ranks.count()], pass_by, travellers, keep, decoder.device)
    for one in travellers:
        one.play(decoder, index)


def _deal(
    chunks: Sequence[Sequence[int]],
    pass_by: Callable[[Sequence[int], list[Made]], Iterator[tuple[int, Iterable[Given]]]],
    travellers: Sequence[Traveller],
    keep: Callable[[Made], None],
    device: torch.device,
) -> None:
    """Let experts pass, a chunk by each rank; travellers take what they give in the order of experts."""
    made: list[Made] = []
    if ranks.count() == 1:
        for who, given in pass_by(chunks[0], made):
            travellers[who].take(given)
        for one in made:
            keep(one)
        return
    dealt = ranks.own(chunks)
    with ranks.alone():
        mine = [(who, list(given)) for numbers in dealt for who, given in pass_by(numbers, made)]
    for source in range(len(chunks)):
        steps, found = ranks.exchange((mine, made), source, device)
        for who, given in steps:
            travellers[who].take(given)
        for one in found:
            keep(one)


def _given_to_base(
    expert: nn.Module, number: int, travellers: Sequence[Traveller]
) -> Iterator[tuple[int, Iterable[Given]]]:
    wide: nn.Module | None = None
    for who, one in enumerate(travellers):
        if one.compressed:
            continue
        if one.hidden.dtype == torch.float32 and next(expert.parameters()).dtype != torch.float32:
            wide = wide or copy.deepcopy(expert).float()
            yield who, one.given(number, wide)
        else:
            yield who, one.given(number, expert)


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
            one.take(one.given(number, expert))
    experts.let_go()
    one.play(decoder, index)


def _parts(call: RoutedCall) -> tuple[Tensor, Tensor, Tensor]:
    return call.hidden, call.chosen, call.gates
