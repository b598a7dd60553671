"""Each request from its first byte to its last, and what is counted of it: for metrics, the log and the key's limits.

The engine reports the tokens of a request when it finishes, under an id that we gave it.
"""

import asyncio
import json
import re
import sys
import time
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from lowbit_server.keys import ANONYMOUS
from lowbit_server.limits import KeyUsage
from lowbit_server.throughput import SlidingWindow

ID = re.compile(r"lb[0-9a-f]{32}")
LATE_S = 10.0  # how long the engine's count of a request is waited for after its answer has ended
KEY_WINDOW_S = 60.0  # a key's tokens are counted when a request ends: a shorter window would flicker
MOST_KEY_LABELS = 200  # further keys share the label "other"


@dataclass
class Exchange:
    """One request. Times are of the monotonic clock; `usage` belongs to its key."""

    path: str
    client_id: str
    usage: KeyUsage
    id: str = field(default_factory=lambda: f"lb{uuid.uuid4().hex}")
    model: str = ""
    stream: bool = False
    reserved_tokens: int = 0
    began: float = field(default_factory=time.monotonic)
    first_byte: float | None = None
    ended: float | None = None
    status: int = 0
    outcome: str = ""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    answered: bool = False
    counted: bool = False


class Exchanges:
    """What is going on and what has been; read by `/metrics`."""

    def __init__(self, *, write_log: bool) -> None:
        self._write_log = write_log
        self._open: dict[str, Exchange] = {}
        self.finished = SlidingWindow()  # admitted requests that ended, per second
        self.outcomes: Counter[tuple[str, str]] = Counter()  # (key, outcome)
        self.rejections: Counter[str] = Counter()  # reason
        self.tokens: Counter[tuple[str, str]] = Counter()  # (key, prompt or generated)
        self.rates: defaultdict[tuple[str, str], SlidingWindow] = defaultdict(  # the same, per second
            lambda: SlidingWindow(KEY_WINDOW_S)
        )
        self._labels: set[str] = set()
        self.active = 0

    def open(self, exchange: Exchange) -> None:
        """An admitted request goes to the engine."""
        self._open[exchange.id] = exchange
        self.active += 1

    def engine_finished(self, engine_id: str, prompt_tokens: int, generated_tokens: int) -> None:
        """The engine's own count of one finished sequence."""
        found = ID.search(engine_id)
        exchange = self._open.get(found.group()) if found else None
        if exchange is None:
            return
        exchange.prompt_tokens = max(exchange.prompt_tokens, prompt_tokens)  # once, however many answers
        exchange.generated_tokens += generated_tokens
        if exchange.ended is not None:
            self._count(exchange)

    def close(self, exchange: Exchange) -> None:
        """The answer of an admitted request has ended, one way or another."""
        exchange.ended = time.monotonic()
        exchange.usage.active -= 1
        self.active -= 1
        self.finished.add(1)
        self.outcomes[self._label(exchange), exchange.outcome] += 1
        if exchange.generated_tokens or exchange.prompt_tokens:
            self._count(exchange)
            del self._open[exchange.id]
        else:
            asyncio.get_running_loop().call_later(LATE_S, self._open.pop, exchange.id, None)
        self._log(exchange)

    def reject(self, exchange: Exchange, status: int, reason: str) -> None:
        """A request was answered with an error before the engine saw it."""
        exchange.ended, exchange.status, exchange.outcome = time.monotonic(), status, f"rejected:{reason}"
        self.rejections[reason] += 1
        self.outcomes[self._label(exchange), "rejected"] += 1
        self._log(exchange)

    def _count(self, exchange: Exchange) -> None:
        if exchange.counted:
            return
        exchange.counted = True
        label = self._label(exchange)
        for kind, count in (("prompt", exchange.prompt_tokens), ("generated", exchange.generated_tokens)):
            self.tokens[label, kind] += count
            self.rates[label, kind].add(count)
        exchange.usage.settle(exchange.reserved_tokens, exchange.prompt_tokens + exchange.generated_tokens)

    def _label(self, exchange: Exchange) -> str:
        name = exchange.usage.key.name
        if name in self._labels or len(self._labels) < MOST_KEY_LABELS:
            self._labels.add(name)
            return name
        return "other"

    def _log(self, exchange: Exchange) -> None:
        """One JSON line, without prompt, answer or key."""
        if not self._write_log:
            return
        ended = exchange.ended or time.monotonic()
        first = None if exchange.first_byte is None else round(exchange.first_byte - exchange.began, 4)
        line = {
            "time": round(time.time(), 3),
            "request_id": exchange.client_id,
            "engine_id": exchange.id,
            "key": exchange.usage.key.name if exchange.usage.key is not ANONYMOUS else None,
            "path": exchange.path,
            "model": exchange.model or None,
            "stream": exchange.stream,
            "status": exchange.status,
            "outcome": exchange.outcome,
            "prompt_tokens": exchange.prompt_tokens or None,
            "generated_tokens": exchange.generated_tokens or None,
            "first_byte_s": first,
            "seconds": round(ended - exchange.began, 4),
        }
        sys.stderr.write(json.dumps(line, ensure_ascii=False) + "\n")
