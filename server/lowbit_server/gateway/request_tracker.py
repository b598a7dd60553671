"""Which requests are running and what was counted of those that ended: for metrics, the log and the keys' limits.

The engine reports a request's tokens when it finishes it, under the id that the gateway gave it.
"""

import asyncio
import contextlib
import json
import re
import sys
import time
from collections import Counter, defaultdict

from prometheus_client import Histogram

from lowbit_server.cost.usage_book import UsageBook
from lowbit_server.cost.usage_file import Counts
from lowbit_server.gateway.keys import ANONYMOUS, OTHER
from lowbit_server.gateway.request_context import RequestContext
from lowbit_server.sliding_window import SlidingWindow

ID = re.compile(r"lb[0-9a-f]{32}")
LATE_S = 10.0  # how long to wait for the engine's count after the response has ended
KEY_WINDOW_S = 60.0  # tokens are counted when a request ends: over a shorter window the rate would flicker
MOST_KEY_LABELS = 200  # further keys share the label OTHER
OVERHEAD_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class RequestTracker:
    """Running requests and counters of ended ones, as `/metrics` shows them; `usage` is told of each key's tokens."""

    def __init__(self, *, write_log: bool, usage: UsageBook | None = None) -> None:
        self._write_log, self._usage = write_log, usage
        self.overhead = Histogram(
            "lowbit_gateway_overhead_seconds",
            "Time that a request spent in the gateway itself, without the engine and without waiting for its client.",
            registry=None,
            buckets=OVERHEAD_BUCKETS_S,
        )
        self._open: dict[str, RequestContext] = {}
        self.finished = SlidingWindow()  # admitted requests that ended, per second
        self.outcomes: Counter[tuple[str, str]] = Counter()  # (key, outcome)
        self.rejections: Counter[str] = Counter()  # reason
        self.tokens: Counter[tuple[str, str]] = Counter()  # (key, prompt or generated)
        self.cached: Counter[str] = Counter()  # by key: of the prompts', those found in the prefix cache
        self.rates: defaultdict[tuple[str, str], SlidingWindow] = defaultdict(  # the same, per second
            lambda: SlidingWindow(KEY_WINDOW_S)
        )
        self._labels: set[str] = set()
        self.active = 0

    def open(self, context: RequestContext) -> None:
        """A request was admitted and goes to the engine."""
        context.lease.admitted = True
        self._open[context.id] = context
        self.active += 1

    def engine_finished(
        self, engine_id: str, prompt_tokens: int, generated_tokens: int, cached_tokens: int = 0
    ) -> None:
        """The engine's own count of one sequence that has ended; the choices of one prompt share its id."""
        found = ID.search(engine_id)
        context = self._open.get(found.group()) if found else None
        if context is None:
            return
        if engine_id in context.prompts:
            prompt_tokens = cached_tokens = 0
        else:
            context.prompts += (engine_id,)
        context.prompt_tokens += prompt_tokens
        context.generated_tokens += generated_tokens
        context.cached_tokens += cached_tokens
        context.finished += 1
        if context.ended is not None:
            self._count(context, prompt_tokens, generated_tokens, cached_tokens)

    def close(self, context: RequestContext) -> None:
        """The response to an admitted request has ended, in whatever way. Nothing for one that was not admitted."""
        lease = context.lease
        if not lease.admitted:
            return
        context.ended = time.monotonic()
        self.active -= 1
        self.finished.add(1)
        context.outcome = context.outcome or "error"
        self.outcomes[self._label(context), context.outcome] += 1
        self.overhead.observe(context.overhead_s)
        refused = 400 <= context.status < 500
        if context.finished:
            self._count(context, context.prompt_tokens, context.generated_tokens, context.cached_tokens)
        elif refused:
            lease.refund()
        elif context.status >= 500 or context.route.cost != "tokens":
            lease.settle(0)
        if refused or context.finished >= lease.demand.sequences:
            del self._open[context.id]
        else:
            asyncio.get_running_loop().call_later(LATE_S, self._forget, context)
        self._log(context)

    def _forget(self, context: RequestContext) -> None:
        """The engine has not counted in time: the prompt is what it certainly read."""
        del self._open[context.id]
        if not context.lease.settled:
            context.lease.settle(context.lease.demand.prompt_tokens)

    def reject(self, context: RequestContext, status: int, reason: str) -> None:
        """A request was refused before the engine saw it."""
        context.ended, context.status, context.outcome = time.monotonic(), status, f"rejected:{reason}"
        self.rejections[reason] += 1
        self.outcomes[self._label(context), "rejected"] += 1
        self._log(context)

    def _count(
        self, context: RequestContext, prompt_tokens: int, generated_tokens: int, cached_tokens: int
    ) -> None:
        label = self._label(context)
        for kind, count in (("prompt", prompt_tokens), ("generated", generated_tokens)):
            self.tokens[label, kind] += count
            self.rates[label, kind].add(count)
        self.cached[label] += cached_tokens
        if self._usage is not None:
            requests = 0 if context.counted else 1
            counts = Counts(requests, prompt_tokens, generated_tokens, cached_tokens)
            self._usage.add(context.lease.usage.key.name, counts)
        context.counted = True
        context.lease.settle(prompt_tokens + generated_tokens)

    def _label(self, context: RequestContext) -> str:
        name = context.lease.usage.key.name
        if name in self._labels or len(self._labels) < MOST_KEY_LABELS:
            self._labels.add(name)
            return name
        return OTHER

    def _log(self, context: RequestContext) -> None:
        """One JSON line, without the prompt, the output or the key."""
        if not self._write_log:
            return
        ended = context.ended or time.monotonic()
        key = context.lease.usage.key
        first = None if context.first_byte is None else round(context.first_byte - context.began, 4)
        line = {
            "time": round(time.time(), 3),
            "request_id": context.client_id,
            "engine_id": context.id,
            "key": key.name if key is not ANONYMOUS else None,
            "path": context.path,
            "model": context.model or None,
            "stream": context.stream,
            "status": context.status,
            "outcome": context.outcome,
            "prompt_tokens": context.prompt_tokens or None,
            "generated_tokens": context.generated_tokens or None,
            "cached_tokens": context.cached_tokens or None,
            "first_byte_s": first,
            "seconds": round(ended - context.began, 4),
        }
        with contextlib.suppress(
            OSError, ValueError
        ):  # whoever read the log is gone: no reason to fail a request
            sys.stderr.write(json.dumps(line, ensure_ascii=False) + "\n")
