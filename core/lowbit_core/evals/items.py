"""What is asked: an item is one question with a request for each of its continuations, or a text."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["choice", "cloze", "text"]
Key = tuple[str, str]
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Request:
    """Asks for the log-probability of each token of `continuation` after `context`."""

    context: str
    continuation: str


@dataclass(frozen=True)
class Item:
    """One question or text.

    `choice`: the model chooses the likeliest request; `gold` is the right one. `cloze`: right where greedy decoding
    gives the continuation. `text`: held-out text, one request without context.
    """

    task: str
    id: str
    kind: Kind
    requests: tuple[Request, ...]
    gold: int | None = None
    normalized: bool = True  # the choice is made by acc_norm, not by acc

    @property
    def key(self) -> Key:
        return self.task, self.id


def sample_items(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """`count` items drawn by the seed, in their original order; all where there are no more."""
    if count >= len(items):
        return list(items)
    chosen = sorted(random.Random(seed).sample(range(len(items)), count))
    return [items[index] for index in chosen]


def encode_pair(request: Request, encode: Encode) -> tuple[list[int], int]:
    """The token ids of the whole request, and how many of them are context.

    Spaces at the context's end are moved to the continuation, and both are encoded together, as in
    lm-evaluation-harness (`_encode_pair`): a token may then span the boundary, as it does in running text.
    """
    stripped = request.context.rstrip(" ")
    continuation = request.context[len(stripped) :] + request.continuation
    whole = encode(stripped + continuation)
    if not stripped:
        return whole, 0
    return whole, min(len(encode(stripped)), len(whole) - 1)
