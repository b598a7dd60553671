"""One side of a comparison: its loads, each with its requests or, where a file has only sums, with those.

Every reader ends here. Only completed requests have latencies, so that a failure can never pass for a fast answer. What
a file does not say is absent and named in `missing`; nothing is guessed.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowbit_core.evals.items import Key as ItemKey
from lowbit_core.evals.scoring import Answer

COMPLETED, REJECTED, FAILED, NOT_SENT = "completed", "rejected", "failed", "not sent"
OUTCOMES = (COMPLETED, REJECTED, FAILED, NOT_SENT)
LATENCIES = {
    "ttft_s": "time to first token",
    "ttfa_s": "time to first answer token",
    "tpot_s": "time per output token",
    "e2e_s": "end to end",
}
OUTPUT_RATE = "output tokens/s"
JOULES = "joules per output token"
PRICE = "price of a million output tokens"

Key = tuple[int, int, int]  # repetition, index, turn
At = tuple[tuple[str, float], ...]  # what was offered: (("requests/s", 4.0),)


@dataclass(frozen=True)
class Request:
    """One measured request: how it ended and, if it completed, its latencies by the names above."""

    outcome: str
    latencies_s: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def of(outcome: str, **latencies_s: float | None) -> "Request":
        """Latencies of what did not complete, and those that were not measured, are left out."""
        known = {name: value for name, value in latencies_s.items() if value is not None}
        return Request(outcome, known if outcome == COMPLETED else {})


@dataclass(frozen=True)
class Load:
    """What was offered, and what became of it. `statistics` is of a file without requests: metric and statistic.

    `per_repetition` has one number a repetition of what is not a request's: output tokens/s, joules, money.
    """

    at: At
    counts: Mapping[str, int]
    requests: Mapping[Key, Request] | None
    statistics: Mapping[tuple[str, str], float] = field(default_factory=dict)
    per_repetition: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def is_closed(self) -> bool:
        """Whether the server set the pace, so that tokens/s are its own and not the schedule's."""
        return not any(name == "requests/s" for name, _ in self.at)

    @property
    def total(self) -> int:
        return sum(self.counts.values())


@dataclass(frozen=True)
class Side:
    """A result. `asked` is what a scenario asks of a server: two with the same can be paired by request."""

    tool: str
    loads: tuple[Load, ...]
    asked: Mapping[str, Any] | None = None
    answers: Mapping[ItemKey, Answer] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def completed(self) -> int:
        return sum(load.counts.get(COMPLETED, 0) for load in self.loads)


def counted(requests: Mapping[Key, Request], not_sent: int = 0) -> dict[str, int]:
    """How many ended in each way."""
    found = Counter(request.outcome for request in requests.values())
    return {name: found[name] for name in OUTCOMES[:3]} | {NOT_SENT: not_sent}


def at_text(at: At) -> str:
    """` at 4 requests/s, 512 prompt tokens`; empty where nothing is known."""
    return f" at {', '.join(f'{value:.4g} {name}' for name, value in at)}" if at else ""
