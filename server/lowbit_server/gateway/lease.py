"""What one request holds, from the first byte of its head to the last of its answer, and how it gives that back.

A lease holds places (in the server's queue and of its key), bytes of its body, and a reservation in the key's buckets.
`enter` takes the first place before the body is read, `charge` the rest once the body says what is asked for, `close`
gives places and bytes back on whatever path, and `settle` replaces the reservation by what the engine counted.
A request that no engine has seen costs nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

from lowbit_server.gateway.key_limits import KeyUsage, Taken
from lowbit_server.gateway.openai_errors import ApiError, too_large

BODIES_AT_ONCE = 16  # so many bodies of the largest size are held at a time, and any number of small ones


@dataclass(frozen=True)
class Demand:
    """What a request asks for. `output_tokens`: stated by the client; `default_tokens`: the most where it is not.

    `of_month`: whether it costs tokens, for which something of the month's must be left.
    """

    prompts: int = 1
    choices: int = 1
    of_month: bool = False
    prompt_tokens: int = 0
    output_tokens: int = 0
    default_tokens: int = 0

    @property
    def sequences(self) -> int:
        """How many the engine will generate."""
        return self.prompts * self.choices


class Capacity:
    """Places and bytes of the whole server. `retry_after`: seconds until a place should be free."""

    def __init__(self, places: int, body_bytes: int, retry_after: Callable[[], int]) -> None:
        self.places, self.body_bytes = places, body_bytes
        self.places_taken = self.bytes_taken = 0
        self._retry_after = retry_after

    def refuse_beyond(self, more: int) -> None:
        """Raise ApiError 429 where `more` places are not free."""
        if self.places_taken + more > self.places:
            raise self._busy("the server is busy; try again later", "queue_full")

    def hold(self, count: int) -> None:
        """Take bytes; raises ApiError 429 where the bodies of all requests are too much."""
        if self.bytes_taken + count > self.body_bytes:
            raise self._busy(
                "the server holds as many request bodies as it may; try again later", "body_memory"
            )
        self.bytes_taken += count

    def _busy(self, message: str, reason: str) -> ApiError:
        return ApiError(429, message, reason, headers={"retry-after": str(self._retry_after())})


class Lease:
    """One request's places, bytes and reservation."""

    __slots__ = (
        "_bytes", "_capacity", "_closed", "_month", "_places", "_requests", "_tokens", "admitted", "demand",
        "settled", "usage",
    )  # fmt: skip

    def __init__(self, capacity: Capacity, usage: KeyUsage) -> None:
        self._capacity, self.usage = capacity, usage
        self.demand = Demand()
        self.admitted = False  # handed to the engine: from then on it may cost something
        self.settled = self._closed = False
        self._places = self._bytes = 0
        self._requests: tuple[Taken | None, ...] = ()
        self._tokens: Taken | None = None
        self._month = 0

    def enter(self) -> None:
        """Take one place and one request, before the body is read; raises ApiError 429."""
        self._capacity.refuse_beyond(1)
        self.usage.refuse_places(1)
        self.usage.refuse_requests(1)
        self._take(1)

    def hold(self, count: int) -> None:
        """Count bytes of the body as they come; raises ApiError 429."""
        self._capacity.hold(count)
        self._bytes += count

    def charge(self, demand: Demand) -> None:
        """Take the other places of a batch, and reserve its tokens; raises ApiError 429 and takes nothing then."""
        more = demand.prompts - self._places
        if more:
            if demand.prompts > self._capacity.places:
                raise too_large(f"{demand.prompts} prompts", f"{self._capacity.places} at once", "queue_full")
            self.usage.refuse_impossible(demand.prompts)
            self._capacity.refuse_beyond(more)
            self.usage.refuse_places(more)
            self.usage.refuse_requests(more)
        certain = demand.prompt_tokens + demand.output_tokens
        month = self.usage.of_month(certain, demand.default_tokens) if demand.of_month else 0
        self._tokens = self.usage.reserve(certain, demand.default_tokens)
        self._month = month
        self.usage.month_reserved += month
        self.demand = demand
        if more:
            self._take(more)

    def close(self) -> None:
        """Give places and bytes back, and everything else of a request that no engine has seen. Twice is once."""
        if self._closed:
            return
        self._closed = True
        self._capacity.places_taken -= self._places
        self._capacity.bytes_taken -= self._bytes
        self.usage.active -= self._places
        if not self.admitted:
            self.refund()

    def refund(self) -> None:
        """Give back all that was counted: the request was refused."""
        for taken in self._requests:
            if taken is not None:
                taken[0].take(-taken[1])
        self._requests = ()
        self.settle(0)

    def settle(self, used: int) -> None:
        """Replace the reservation by the engine's count; a later count is added to it."""
        self.usage.use_tokens(used, self._tokens)
        self.usage.month_reserved -= self._month
        self._month, self._tokens, self.settled = 0, None, True

    def _take(self, count: int) -> None:
        self._capacity.places_taken += count
        self.usage.active += count
        self._places += count
        self._requests += (self.usage.count_request(count),)
