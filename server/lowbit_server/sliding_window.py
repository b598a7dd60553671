"""Events per second over the last seconds, computed when asked, so that an idle server reads zero."""

import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 10.0
BUCKETS_PER_WINDOW = 100  # memory stays constant however many engine steps a second there are


class SlidingWindow:
    """Events per second over the last `window_s` seconds, to within one bucket (`window_s` / 100)."""

    def __init__(self, window_s: float = WINDOW_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._window_s = window_s
        self._bucket_s = window_s / BUCKETS_PER_WINDOW
        self._clock = clock
        self._buckets: deque[tuple[int, int]] = deque()  # (bucket number, count), oldest first

    def add(self, count: int) -> None:
        """Count `count` events now."""
        if count == 0:
            return
        bucket = self._now()
        if self._buckets and self._buckets[-1][0] == bucket:
            count += self._buckets.pop()[1]
        self._buckets.append((bucket, count))
        self._expire()

    def per_second(self) -> float:
        """The events of the window divided by its whole length."""
        self._expire()
        return sum(count for _, count in self._buckets) / self._window_s

    def _now(self) -> int:
        return int(self._clock() / self._bucket_s)

    def _expire(self) -> None:
        oldest = self._now() - BUCKETS_PER_WINDOW
        while self._buckets and self._buckets[0][0] <= oldest:
            self._buckets.popleft()
