"""Routed experts that are not in memory: each is made when it is asked for, and let go when others are.

So a layer of any number of experts is as large as what is around them. Whoever wants all experts to see all tokens lets
the layer run once with the experts `recording` what they are called with, asks for one expert after the other, and lets
the layer run again with the experts `playing` the sums (walk/visit.py).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_quantize.model.experts.linears import ExpertObserver, Routed, routed_sum
from lowbit_quantize.model.folds import multiply_columns

Make = Callable[[int], nn.Module]
Change = Callable[[int, Any], None]  # of an expert, with its number


@dataclass(frozen=True)
class RoutedCall:
    """What a block calls its experts with: tokens (tokens, hidden), their experts and gates, both (tokens, k)."""

    hidden: Tensor
    chosen: Tensor
    gates: Tensor

    def of(self, number: int) -> tuple[Tensor, Tensor]:
        """Which tokens an expert is given, and its gates for them, both (its tokens,)."""
        token, place = torch.where(self.chosen == number)
        return token, self.gates[token, place]


class _Nothing(list[RoutedCall]):
    def append(self, _: RoutedCall) -> None:
        """Keep nothing."""


class VisitedExperts(Routed):
    """Called as a list of experts is; item `number` is made when it is asked for, and held until another is made so."""

    observer: ExpertObserver | None = None

    def __init__(
        self, make: Make, pattern: nn.Module, numbers: Sequence[int], changes: Sequence[Change] = ()
    ) -> None:
        """`make` gives the base model's expert of a number, `numbers` are those that are here, in order.

        `pattern` is an expert without weights; `changes` are made to each expert, in turn, before anybody sees it.
        """
        super().__init__()
        self._make, self.numbers, self._changes = make, tuple(numbers), list(changes)
        self._kept: dict[int, tuple[nn.Module]] = {}
        self._pattern = (pattern,)  # in a tuple: it is no submodule
        self._held: dict[int, tuple[nn.Module]] = {}  # in tuples: they are no submodules
        self._calls: list[RoutedCall] | None = None
        self._given: Iterator[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> nn.Module:
        if number not in self._held:
            self.let_go()
            self.hold([number])
        return self._held[number][0]

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[number] for number in range(len(self)))

    def __getattr__(self, name: str) -> Any:
        return self[int(name)] if name.isdigit() else super().__getattr__(name)

    @property
    def pattern(self) -> nn.Module:
        """An expert without weights."""
        return self._pattern[0]

    @staticmethod
    def inside(name: str) -> str:
        """The name of a module in an expert, of its name here."""
        return name.partition(".")[2]

    def take(self, number: int, expert: nn.Module) -> nn.Module:
        """Hold as `number`, with those that are held, what was made of the base elsewhere; change it as all are."""
        if number in self._kept:
            expert = self._kept[number][0]
        else:
            for change in self._changes:
                change(number, expert)
        self._held[number] = (expert,)
        return expert

    def hold(self, numbers: Iterable[int]) -> None:
        """Make these and hold them, with those that are held, until they are let go."""
        for number in numbers:
            self.take(number, self._make(self.numbers[number]))

    def keep(self, number: int) -> None:
        """Keep an expert in memory as it is now; nothing that is changed later changes it."""
        self._kept[number] = (self[number],)

    def let_go(self) -> None:
        """Hold no expert."""
        self._held = {}

    def change(self, change: Change, pattern: nn.Module | None = None) -> None:
        """Make one more change to every expert, from now on; where shapes change, `pattern` has them."""
        self._changes.append(change)
        self._pattern = self._pattern if pattern is None else (pattern,)
        self.let_go()

    def multiply(self, linear: str, scale: Tensor) -> None:
        """Multiply the columns of a linear, by its name in an expert, of every expert."""
        self.change(lambda _, expert: multiply_columns(expert.get_submodule(linear), scale))

    def replace(self, number: int, parameters: Mapping[str, Tensor]) -> None:
        """Let an expert have other parameters than the base's."""

        def load(one: int, expert: nn.Module) -> None:
            if one == number:
                expert.load_state_dict(dict(parameters))

        self.change(load)

    def only(self, kept: Sequence[int]) -> "VisitedExperts":
        """Some of the experts, in this order."""

        def as_before(change: Change) -> Change:
            return lambda number, expert: change(kept[number], expert)

        numbers = [self.numbers[number] for number in kept]
        changes = [as_before(change) for change in self._changes]
        return VisitedExperts(self._make, self.pattern, numbers, changes)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As of `ExpertList`; zeros while calls are recorded, and what was given where outputs are played."""
        if self._given is not None:
            return next(self._given)
        if self._calls is not None:
            self._calls.append(RoutedCall(hidden_states, top_k_index, top_k_weights))
            return torch.zeros_like(hidden_states)
        return routed_sum(self, hidden_states, top_k_index, top_k_weights)

    @contextmanager
    def recording(self) -> Iterator[list[RoutedCall]]:
        """The calls of the block while the layer runs; the experts give zeros."""
        before, self._calls = self._calls, []
        try:
            yield self._calls
        finally:
            self._calls = before

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Give zeros, and keep no calls: nobody looks at what the experts give."""
        before, self._calls = self._calls, _Nothing()
        try:
            yield
        finally:
            self._calls = before

    @contextmanager
    def playing(self, outputs: Sequence[Tensor]) -> Iterator[None]:
        """Give these, one a call, while the layer runs."""
        before, self._given = self._given, iter(outputs)
        try:
            yield
        finally:
            self._given = before
