"""What is asked: an item is one question, with one request for each of its continuations."""

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
    """`choice`: which request is likeliest, `gold` is right. `cloze`: is the one request what greedy decoding gives.
    `text`: held-out text, one request without context."""

    task: str
    id: str
    kind: Kind
    requests: tuple[Request, ...]
    gold: int | None = None
    normalized: bool = True  # log-probabilities are divided by the length of the continuation

    @property
    def key(self) -> Key:
        return self.task, self.id


def take(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """`count` items drawn by the seed, in their own order; all where there are no more."""
    if count >= len(items):
        return list(items)
    chosen = sorted(random.Random(seed).sample(range(len(items)), count))
    return [items[index] for index in chosen]


def split(request: Request, encode: Encode) -> tuple[list[int], int]:
    """The token ids of the whole request, and how many of them are context.

    Spaces at the context's end belong to the continuation, and the whole is encoded at once, as in
    lm-evaluation-harness: tokens at the seam are those that the model would see.
    """
    stripped = request.context.rstrip(" ")
    continuation = request.context[len(stripped) :] + request.continuation
    whole = encode(stripped + continuation)
    if not stripped:
        return whole, 0
    return whole, min(len(encode(stripped)), len(whole) - 1)
