"""Each key's limits: requests and tokens per minute, as token buckets, concurrent requests, and tokens of a month.

A bucket holds one minute's worth and fills steadily, so a key may burst but cannot exceed its rate for long.
An estimate of a request's tokens is reserved when it comes in and corrected to the engine's count when it ends. Where
more was used than reserved, that takes a bucket below zero; the key then waits until it has filled again.
The tokens of a month are those of the usage file, and what running requests have reserved.
"""

import math
import time
from collections.abc import Callable, Iterable

from lowbit_server.cost.usage_book import UsageBook
from lowbit_server.cost.usage_file import next_month
from lowbit_server.gateway.keys import Key
from lowbit_server.gateway.openai_errors import ApiError, too_large

MINUTE_S = 60.0


class Bucket:
    """At most `per_minute` a minute. A clock that is set back fills nothing, and one that leaps fills it once."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._level, self._at = float(per_minute), clock()

    def level(self) -> float:
        """What may be taken now."""
        now = self._clock()
        passed_s = max(0.0, now - self._at)
        self._level = min(self.per_minute, self._level + passed_s * self.per_minute / MINUTE_S)
        self._at = now
        return self._level

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount`, at most a full bucket, may be taken."""
        return max(0.0, (amount - self.level()) * MINUTE_S / self.per_minute)

    def take(self, amount: float) -> None:
        """Take `amount`, or give back where it is negative, whatever the level is."""
        self._level = min(self.per_minute, self.level() - amount)

    def change(self, per_minute: int) -> None:
        """Another limit from now on: what has been used stays used, as far as the new limit goes."""
        level = self.level()
        used = self.per_minute - level
        self.per_minute, self._level = per_minute, max(min(level, 0.0), per_minute - used)


Taken = tuple[Bucket, int]  # what was taken, and from where


class KeyUsage:
    """How much one key has used of its limits."""

    def __init__(self, key: Key, clock: Callable[[], float], book: UsageBook | None = None) -> None:
        self._clock, self._book, self.active = clock, book, 0
        self.month_reserved = 0  # tokens of the month that running requests may still use
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.change(key)

    def change(self, key: Key) -> None:
        """The key's entry in the file has changed; what is in use stays in use."""
        self.key = key
        self.requests = self._changed(self.requests, key.requests_per_minute)
        self.tokens = self._changed(self.tokens, key.tokens_per_minute)

    def _changed(self, bucket: Bucket | None, per_minute: int | None) -> Bucket | None:
        if per_minute is None:
            return None
        if bucket is None:
            return Bucket(per_minute, self._clock)
        if bucket.per_minute != per_minute:
            bucket.change(per_minute)
        return bucket

    @property
    def idle(self) -> bool:
        """Whether it could be forgotten: nothing runs, and every bucket is full."""
        buckets = (self.requests, self.tokens)
        return (
            not self.active
            and not self.month_reserved
            and all(one is None or one.level() >= one.per_minute for one in buckets)
        )

    def refuse_impossible(self, prompts: int) -> None:
        """Raise ApiError 429 for more prompts in one request than the key may ever send at once."""
        limits = ("concurrent", self.key.concurrent_requests, "at once"), (
            "requests", self.key.requests_per_minute, "per minute",
        )  # fmt: skip
        for reason, most, unit in limits:
            if most is not None and prompts > most:
                raise too_large(f"{prompts} prompts", f"{most} {unit}", f"key_{reason}")

    def refuse_places(self, more: int) -> None:
        """Raise ApiError 429 where `more` requests at once are too many."""
        limit = self.key.concurrent_requests
        if more > 0 and limit is not None and self.active + more > limit:
            raise self._refusal("concurrent", f"{limit} concurrent requests", 1.0)

    def refuse_requests(self, more: int) -> None:
        """Raise ApiError 429 where the minute's requests are used up."""
        if more > 0 and self.requests is not None and (wait_s := self.requests.wait_s(more)) > 0:
            raise self._refusal("requests", f"{self.requests.per_minute} requests per minute", wait_s)

    def of_month(self, certain: int, possible: int) -> int:
        """The tokens of the month that a request should reserve; raises ApiError 429 where they are not left.

        `possible`: more, as far as the quota goes.
        """
        quota, book = self.key.tokens_per_month, self._book
        if quota is None or book is None:
            return 0
        used = book.used(self.key.name).tokens
        left = quota - used - self.month_reserved
        if used + max(certain, 1) > quota:
            raise self._over_quota(quota, used, certain, book)
        if max(certain, 1) > left:
            rest = f"what running requests leave of its {quota} tokens for {book.month}"
            raise self._refusal("month", rest, 1.0)
        return min(certain + possible, left)

    def _over_quota(self, quota: int, used: int, certain: int, book: UsageBook) -> ApiError:
        renewed = next_month(book.now())
        asked = f"; this request asks for {certain}" if used < quota else ""
        return ApiError(
            429,
            f"the key {self.key.name!r} has used {used} of its {quota} tokens for {book.month}{asked}; the quota "
            f"is renewed at {renewed:%Y-%m-%dT%H:%M:%SZ}",
            "key_month",
            code="insufficient_quota",
            headers={
                "retry-after": str(max(1, math.ceil(renewed.timestamp() - book.now()))),
                "x-should-retry": "false",  # OpenAI's clients would otherwise try again within seconds
            },
        )

    def reserve(self, certain: int, possible: int) -> Taken | None:
        """Take tokens and say from where; raises ApiError 429. `possible`: more, as far as a bucket goes."""
        bucket = self.tokens
        if bucket is None:
            return None
        limit = f"{bucket.per_minute} tokens per minute"
        if certain > bucket.per_minute:
            raise too_large(f"{certain} tokens", limit, "key_tokens")
        tokens = min(certain + possible, bucket.per_minute)
        if (wait_s := bucket.wait_s(tokens)) > 0:
            raise self._refusal("tokens", limit, wait_s)
        bucket.take(tokens)
        return bucket, tokens

    def count_request(self, count: int) -> Taken | None:
        """Take requests of the minute and say from where."""
        if self.requests is None:
            return None
        self.requests.take(count)
        return self.requests, count

    def use_tokens(self, used: int, reserved: Taken | None) -> None:
        """Count used tokens in place of those reserved from a bucket, which a change of limits may have replaced."""
        back = reserved[1] if reserved is not None and reserved[0] is self.tokens else 0
        if self.tokens is not None and used != back:
            self.tokens.take(used - back)

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
    """The usage of every key. A key keeps it when its entry changes, under its name or under its hash.

    The usage of a key that is gone is kept while it is not idle, so that one taken out and put back has no fresh start.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, book: UsageBook | None = None) -> None:
        self._clock, self._book = clock, book
        self._by_name: dict[str, KeyUsage] = {}

    def of(self, key: Key) -> KeyUsage:
        """The usage of a key."""
        usage = self._by_name.get(key.name)
        if usage is None:
            usage = self._by_name[key.name] = KeyUsage(key, self._clock, self._book)
        return usage

    def replace(self, keys: Iterable[Key]) -> None:
        """The file was read again. A renamed key is found by its hash, where no other key has taken its name."""
        keys = tuple(keys)
        names = {key.name for key in keys}
        left = {usage.key.sha256: usage for name, usage in self._by_name.items() if name not in names}
        found: dict[str, KeyUsage] = {}
        for key in keys:
            usage = self._by_name.get(key.name) or left.pop(key.sha256, None)
            if usage is not None:
                usage.change(key)
                found[key.name] = usage
        gone = {name: usage for name, usage in self._by_name.items() if usage in left.values()}
        self._by_name = {name: usage for name, usage in gone.items() if not usage.idle} | found
