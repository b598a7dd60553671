"""Scoring through a served endpoint: whoever speaks HTTP offers it as the entry point `endpoint` of `lowbit.scorers`.

`lowbit evaluate --target` thus needs no import of the program that does it, as `lowbit` needs none of its commands.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol

from lowbit_core.errors import ConfigError
from lowbit_core.evals.items import Item
from lowbit_core.evals.scoring import Answer

GROUP, NAME = "lowbit.scorers", "endpoint"


class Endpoint(Protocol):
    """A server that was found to serve the model and to score continuations."""

    @property
    def model(self) -> str:
        """The model's name there."""

    def answers(self, items: Sequence[Item]) -> Iterator[Answer]:
        """Each item's answer, as they come; those of items that the server lost have no `chosen`."""


Connect = Callable[[str, str], Endpoint]  # URL; the served name, or a checkpoint directory that is served


def find_connect(entries: Iterable[EntryPoint] | None = None) -> Connect:
    """What connects to an endpoint; ConfigError with the pip command where this installation has nothing."""
    found = entry_points(group=GROUP) if entries is None else entries
    entry = next((one for one in found if one.name == NAME), None)
    if entry is None:
        raise ConfigError(
            "--target needs lowbit's load test, which this installation does not know; run: pip install '.[cpu]' "
            "(or .[gpu]) in the clone"
        )
    try:
        connect: Connect = entry.load()
    except ImportError as error:
        raise ConfigError(f"--target needs {error.name}; run: pip install {error.name}") from error
    return connect
