"""What the pass of one batch showed, noted to be told to those that observe: on every rank, batch after batch.

A batch runs on one rank. There its observers only note; then all ranks get the notes and tell them to the observers in
the order of the batches, as if each had run them all (device/ranks.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lowbit_quantize.model.hooks import (
    InputObservers,
    KVCacheHook,
    SeenAll,
    attention_observed_by,
    attention_observer,
)

ATTENTION, CACHE = "attention", "cache"
Note = tuple[str, str, tuple[Tensor, ...]]  # what was seen, of which module, and what it was


class Tape:
    """The notes of one batch."""

    def __init__(self) -> None:
        self.notes: list[Note] = []

    def note(self, what: str, name: str, *seen: Tensor) -> None:
        """Tensors are kept as they are now: a layer may go on to change them."""
        self.notes.append((what, name, tuple(one.clone() for one in seen)))

    def observers(self, what: str, names: Sequence[str]) -> InputObservers:
        """Observers of the inputs of modules, in this order, which note them."""

        def noting(name: str) -> Callable[[Tensor], None]:
            return lambda inputs: self.note(what, name, inputs)

        return {name: noting(name) for name in names}

    def hook(self, hook: KVCacheHook | None) -> KVCacheHook | None:
        """In place of a hook that observes keys and values; one that changes them is itself."""
        if not observes(hook):
            return hook

        def call(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            self.note(CACHE, "", keys, values)
            return keys, values

        return call

    @contextmanager
    def attention(self) -> Iterator[None]:
        """Note what whoever looks at attention now wants to know of it."""
        meter: Any = attention_observer()
        if meter is None:
            yield
            return

        def call(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
            self.note(ATTENTION, "", meter.measure(query, key, mask, scaling))
            if meter.stop:
                raise SeenAll

        with attention_observed_by(call):
            yield


def observes(hook: KVCacheHook | None) -> bool:
    """Whether a KV-cache hook only looks."""
    return bool(getattr(hook, "observes", False))


def tell(notes: Sequence[Note], observers: dict[str, InputObservers], hook: KVCacheHook | None) -> None:
    """Tell the notes of a batch, in their order; `observers` are by what they note."""
    meter: Any = attention_observer()
    for what, name, seen in notes:
        if what == ATTENTION:
            meter.take(*seen)
        elif what == CACHE:
            assert hook is not None
            hook(*seen)
        else:
            observers[what][name](*seen)
