"""Which requests are scored again: each with the same probability, drawn when it begins, handed on when it has ended.

The engine keeps the token ids of a request while it runs, so nothing is copied of requests that were not drawn.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """Token ids of one finished request."""

    prompt: tuple[int, ...]
    generated: tuple[int, ...]


class Sampler:
    """Told by the engine of requests by its own ids. `hand_on` gets those that were drawn and ended by themselves."""

    def __init__(self, share: float, hand_on: Callable[[Answer], None], seed: int | None = None) -> None:
        self._share, self._hand_on, self._random = share, hand_on, random.Random(seed)
        self._drawn: dict[str, Callable[[], Answer]] = {}

    def draws(self) -> bool:
        """Whether a request that begins now is drawn."""
        return self._random.random() < self._share

    def watch(self, engine_id: str, read: Callable[[], Answer]) -> None:
        """A drawn request runs; `read` gives its tokens when it has ended."""
        self._drawn[engine_id] = read

    def finished(self, engine_id: str) -> None:
        """The engine has finished a request."""
        if (read := self._drawn.pop(engine_id, None)) is not None:
            self._hand_on(read())

    def aborted(self, engine_id: str) -> None:
        """The engine has given a request up: its client has left, or its time was over."""
        self._drawn.pop(engine_id, None)
