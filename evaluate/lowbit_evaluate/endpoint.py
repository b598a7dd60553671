"""Finds the program that asks a served endpoint: the entry point `endpoint` in the group `lowbit.scorers`.

It is the load test's, which speaks HTTP. Through the entry point, `lowbit evaluate --target` does not import it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol

from lowbit_core.access import Access
from lowbit_core.errors import ConfigError
from lowbit_core.evals.items import Item
from lowbit_core.evals.scoring import Answer

GROUP, NAME = "lowbit.scorers", "endpoint"


class Endpoint(Protocol):
    """A server that serves the model and scores continuations."""

    @property
    def model(self) -> str:
        """The model's name there."""

    def answers(self, items: Sequence[Item]) -> Iterator[Answer]:
        """Each item's answer, as they come; an item that the server did not answer has no `chosen`."""


# URL; the served name, or a checkpoint directory that is served; headers, certificates and so on
Connect = Callable[[str, str, Access], Endpoint]


def find_connect(entries: Iterable[EntryPoint] | None = None) -> Connect:
    """The function that connects to an endpoint; ConfigError with the pip command where none is installed."""
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
