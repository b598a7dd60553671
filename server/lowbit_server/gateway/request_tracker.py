"""Which requests are running and what was counted of those that ended: for metrics, the log and the keys' limits.

The engine reports a request's tokens when it finishes it, under the id that the gateway gave it.
"""

import asyncio
import json
import re
import sys
import time
from collections import Counter, defaultdict

from lowbit_server.gateway.keys import ANONYMOUS
from lowbit_server.gateway.request_context import RequestContext
from lowbit_server.sliding_window import SlidingWindow

ID = re.compile(r"lb[0-9a-f]{32}")
LATE_S = 10.0  # how long to wait for the engine's count after the response has ended
KEY_WINDOW_S = 60.0  # tokens are counted when a request ends: over a shorter window the rate would flicker
MOST_KEY_LABELS = 200  # further keys share the label "other"


class RequestTracker:
    """Running requests and counters of ended ones, as `/metrics` shows them."""

    def __init__(self, *, write_log: bool) -> None:
        self._write_log = write_log
        self._open: dict[str, RequestContext] = {}
        self.finished = SlidingWindow()  # admitted requests that ended, per second
        self.outcomes: Counter[tuple[str, str]] = Counter()  # (key, outcome)
        self.rejections: Counter[str] = Counter()  # reason
        self.tokens: Counter[tuple[str, str]] = Counter()  # (key, prompt or generated)
        self.rates: defaultdict[tuple[str, str], SlidingWindow] = defaultdict(  # the same, per second
            lambda: SlidingWindow(KEY_WINDOW_S)
        )
        self._labels: set[str] = set()
        self.active = 0

    def open(self, context: RequestContext) -> None:
        """A request was admitted and goes to the engine."""
        self._open[context.id] = context
        self.active += 1

    def engine_finished(self, engine_id: str, prompt_tokens: int, generated_tokens: int) -> None:
        """The engine's own count of one finished sequence."""
        found = ID.search(engine_id)
        context = self._open.get(found.group()) if found else None
        if context is None:
            return
        context.prompt_tokens = max(
            context.prompt_tokens, prompt_tokens
        )  # the prompt counts once, however many choices
        context.generated_tokens += generated_tokens
        if context.ended is not None:
            self._count(context)

    def close(self, context: RequestContext) -> None:
        """The response to an admitted request has ended, in whatever way."""
        context.ended = time.monotonic()
        context.usage.active -= 1
        self.active -= 1
        self.finished.add(1)
        self.outcomes[self._label(context), context.outcome] += 1
        if context.generated_tokens or context.prompt_tokens:
            self._count(context)
            del self._open[context.id]
        else:
            asyncio.get_running_loop().call_later(LATE_S, self._open.pop, context.id, None)
        self._log(context)

    def reject(self, context: RequestContext, status: int, reason: str) -> None:
        """A request was refused before the engine saw it."""
        context.ended, context.status, context.outcome = time.monotonic(), status, f"rejected:{reason}"
        self.rejections[reason] += 1
        self.outcomes[self._label(context), "rejected"] += 1
        self._log(context)

    def _count(self, context: RequestContext) -> None:
        if context.tokens_counted:
            return
        context.tokens_counted = True
        label = self._label(context)
        for kind, count in (("prompt", context.prompt_tokens), ("generated", context.generated_tokens)):
            self.tokens[label, kind] += count
            self.rates[label, kind].add(count)
        context.usage.settle(context.reserved_tokens, context.prompt_tokens + context.generated_tokens)

    def _label(self, context: RequestContext) -> str:
        name = context.usage.key.name
        if name in self._labels or len(self._labels) < MOST_KEY_LABELS:
            self._labels.add(name)
            return name
        return "other"

    def _log(self, context: RequestContext) -> None:
        """One JSON line, without the prompt, the output or the key."""
        if not self._write_log:
            return
        ended = context.ended or time.monotonic()
        first = None if context.first_byte is None else round(context.first_byte - context.began, 4)
        line = {
            "time": round(time.time(), 3),
            "request_id": context.client_id,
            "engine_id": context.id,
            "key": context.usage.key.name if context.usage.key is not ANONYMOUS else None,
            "path": context.path,
            "model": context.model or None,
            "stream": context.stream,
            "status": context.status,
            "outcome": context.outcome,
            "prompt_tokens": context.prompt_tokens or None,
            "generated_tokens": context.generated_tokens or None,
            "first_byte_s": first,
            "seconds": round(ended - context.began, 4),
        }
        sys.stderr.write(json.dumps(line, ensure_ascii=False) + "\n")
