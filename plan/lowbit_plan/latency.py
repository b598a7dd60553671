"""Time per output token and to the first one, from a model's work and how fast a processor does each part of it.

A sum over what stands in the model: each product and each layer's attention takes what `Speeds` says of it (on a card
the roofline of Williams, Waterman and Patterson, 2009; on this machine what the engine's own kernels took), and with
them goes what a step costs beside. Steps follow each other; nothing overlaps on one device.
"""

from dataclasses import dataclass
from typing import Protocol

from lowbit_plan.targets import Targets
from lowbit_plan.work import CHUNK, Attention, Product, RoutedExperts, Work


class Speeds(Protocol):
    """Seconds of one call of each kind, with so many tokens."""

    def product_s(self, product: Product, tokens: int) -> float: ...

    def attention_s(self, one: Attention, streams: int, queries: int, context: int) -> float: ...

    def experts_s(self, experts: RoutedExperts, tokens: int) -> float: ...

    def beside_s(self, layers: int, streams: int, queries: int) -> float: ...


@dataclass(frozen=True)
class Latency:
    """Seconds, by what takes them."""

    products: float
    experts: float
    attention: float
    head: float
    beside: float

    @property
    def total(self) -> float:
        return self.products + self.experts + self.attention + self.head + self.beside

    def __add__(self, other: "Latency") -> "Latency":
        mine, theirs = self.parts(), other.parts()
        return Latency(**{name: mine[name] + theirs[name] for name in mine})

    def parts(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("products", "experts", "attention", "head", "beside")}


def inter_token(work: Work, speeds: Speeds, streams: int, context: int) -> Latency:
    """Between two tokens of a stream, all streams generating with `context` tokens behind them."""
    step = _step(work, speeds, streams, 1, context)
    return step + _beside(speeds.beside_s(work.layers, streams, 1))


def first_token(work: Work, speeds: Speeds, prompt: int) -> Latency:
    """From a prompt's arrival to its first token, where nothing else runs."""
    total = _beside(speeds.beside_s(work.layers, 1, prompt))
    for start in range(0, prompt, CHUNK):
        queries = min(CHUNK, prompt - start)
        total += _step(work, speeds, 1, queries, start + queries)
    return total


def predicted(work: Work, speeds: Speeds, targets: Targets) -> tuple[Latency, Latency]:
    """At the targets' streams, context and prompt: between tokens, and to the first one."""
    itl = inter_token(work, speeds, targets.streams, targets.context)
    return itl, first_token(work, speeds, targets.prompt)


def _step(work: Work, speeds: Speeds, streams: int, queries: int, context: int) -> Latency:
    """A step of `queries` tokens of each stream, of which the last ones go to the head."""
    tokens = streams * queries
    return Latency(
        products=sum(count * speeds.product_s(one, tokens) for one, count in work.products.items()),
        experts=sum(count * speeds.experts_s(one, tokens) for one, count in work.experts.items()),
        attention=sum(
            count * speeds.attention_s(one, streams, queries, context)
            for one, count in work.attention.items()
        ),
        head=speeds.product_s(work.head, streams),
        beside=0.0,
    )


def _beside(seconds: float) -> Latency:
    return Latency(0.0, 0.0, 0.0, 0.0, seconds)
