"""Each key's limits: requests and tokens per minute, as token buckets, and concurrent requests.

A bucket holds one minute's worth and fills steadily, so a key may burst but cannot exceed its rate for long.
An estimate of a request's tokens is reserved when it comes in and corrected to the engine's count when it ends. That
can take a bucket below zero; the key then waits until it has filled again.
"""

import math
import time
from collections.abc import Callable

from lowbit_server.gateway.keys import Key
from lowbit_server.gateway.openai_errors import ApiError

MINUTE_S = 60.0


class Bucket:
    """At most `per_minute` a minute."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._level, self._at = float(per_minute), clock()

    def level(self) -> float:
        """What may be taken now."""
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / MINUTE_S)
        self._at = now
        return self._level

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` may be taken; more than a full bucket waits for a full one."""
        missing = min(amount, self.per_minute) - self.level()
        return max(0.0, missing * MINUTE_S / self.per_minute)

    def take(self, amount: float) -> None:
        """Take `amount`, or give back where it is negative, whatever the level is."""
        self._level = self.level() - amount


class KeyUsage:
    """How much one key has used of its limits."""

    def __init__(self, key: Key, clock: Callable[[], float]) -> None:
        self.key = key
        self.active = 0
        self.requests = Bucket(key.requests_per_minute, clock) if key.requests_per_minute else None
        self.tokens = Bucket(key.tokens_per_minute, clock) if key.tokens_per_minute else None

    def admit(self, tokens: int) -> None:
        """Count one request and an estimate of its tokens; raises ApiError 429 when a limit is reached."""
        limit = self.key.concurrent_requests
        if limit is not None and self.active >= limit:
            raise self._refusal("concurrent", f"{limit} concurrent requests", 1.0)
        for bucket, amount, unit in ((self.requests, 1, "requests"), (self.tokens, tokens, "tokens")):
            if bucket is not None and (wait_s := bucket.wait_s(amount)) > 0:
                raise self._refusal(unit, f"{bucket.per_minute} {unit} per minute", wait_s)
        if self.requests is not None:
            self.requests.take(1)
        if self.tokens is not None:
            self.tokens.take(tokens)
        self.active += 1

    def settle(self, reserved: int, used: int) -> None:
        """Correct the estimate by what the engine counted."""
        if self.tokens is not None:
            self.tokens.take(used - reserved)

    def headers(self) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*` headers for the limits that this key has."""
        found = {}
        for unit, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{unit}"] = str(bucket.per_minute)
                found[f"x-ratelimit-remaining-{unit}"] = str(max(0, math.floor(bucket.level())))
                found[f"x-ratelimit-reset-{unit}"] = f"{bucket.wait_s(bucket.per_minute):.3f}s"
        return found

    def _refusal(self, reason: str, limit: str, wait_s: float) -> ApiError:
        return ApiError(
            429,
            f"the key {self.key.name!r} has reached its limit of {limit}; try again in {math.ceil(wait_s)} s",
            f"key_{reason}",
            headers={"retry-after": str(max(1, math.ceil(wait_s)))} | self.headers(),
        )


class KeyUsages:
    """The usage of every key seen so far; a key whose entry in the file changed starts with full buckets."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._by_name: dict[str, KeyUsage] = {}

    def of(self, key: Key) -> KeyUsage:
        """The usage of a key."""
        usage = self._by_name.get(key.name)
        if usage is None or usage.key != key:
            usage = self._by_name[key.name] = KeyUsage(key, self._clock)
        return usage
