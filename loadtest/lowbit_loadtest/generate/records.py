"""What one request leaves behind."""

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """How a request ended; every request that was sent has exactly one."""

    COMPLETED = "completed"  # finish_reason and [DONE] arrived
    REJECTED = "rejected"  # 429 or 503: the server said that it is full
    FAILED = "failed"  # any other status, an error event, a broken event, or no connection
    CUT_OFF = "cut_off"  # the stream ended without finish_reason or without [DONE]
    TIMED_OUT = "timed_out"  # the client's deadline passed


@dataclass(frozen=True)
class RequestRecord:
    """One request. Times are of the machine's one monotonic clock; token counts are the server's, None if not given.

    `intended_s` is when the schedule wanted it sent; latencies count from there, so that a generator or a server
    that falls behind does not hide it (coordinated omission). None in a closed loop: it is due when it is sent.
    """

    outcome: Outcome
    sent_s: float
    ended_s: float
    chunk_times_s: tuple[float, ...] = ()  # arrival of each chunk that carried output
    first_answer_s: float | None = None  # arrival of the first output that is not reasoning
    finished_s: float | None = None  # arrival of finish_reason
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    visible_tokens: int | None = None  # of the output tokens: those that were sent, without hidden reasoning
    reasoning_tokens: int | None = None
    cached_tokens: int | None = None  # of the prompt: found in the server's prefix cache
    detail: str = ""
    notes: tuple[str, ...] = ()  # what a reader of a completed request's numbers must know
    intended_s: float | None = None
    index: int = 0
    turn: int = 0
    turns: int = 1  # of its session, as planned
    warm_up: bool = False
    max_tokens: int | None = None
    chunk_tokens: tuple[int, ...] = ()  # tokens of each chunk, where the server counts as it goes
    text: str = ""  # kept only for conversations, while they run

    @property
    def due_s(self) -> float:
        return self.sent_s if self.intended_s is None else self.intended_s

    @property
    def end_to_end_s(self) -> float:
        return self.ended_s - self.due_s

    @property
    def ttft_s(self) -> float | None:
        return self.chunk_times_s[0] - self.due_s if self.chunk_times_s else None

    @property
    def time_per_output_token_s(self) -> float | None:
        """(last − first) / (tokens that were sent − 1); None for one token, or without usage."""
        tokens = self.sent_tokens or 0
        if not self.chunk_times_s or self.finished_s is None or tokens < 2:
            return None
        return (self.finished_s - self.chunk_times_s[0]) / (tokens - 1)

    @property
    def time_to_first_answer_s(self) -> float | None:
        """As `ttft_s`, to the first output that is not reasoning."""
        return None if self.first_answer_s is None else self.first_answer_s - self.due_s

    @property
    def sent_tokens(self) -> int | None:
        """The output tokens that came as chunks: all of them, unless the server hides some."""
        return self.output_tokens if self.visible_tokens is None else self.visible_tokens

    @property
    def hidden_tokens(self) -> int:
        """Output tokens that the server did not send: what it thought."""
        return max(0, (self.output_tokens or 0) - (self.sent_tokens or 0))

    @property
    def contradiction(self) -> str | None:
        """Why the server's usage cannot be true, or None.

        An answer cannot have more tokens than its limit, and hardly fewer tokens than chunks: a token may be
        withheld until its letters are whole, but is not split over chunks.
        """
        if self.output_tokens is None:
            return None
        if self.max_tokens is not None and self.output_tokens > self.max_tokens:
            return f"usage says more output tokens than max_tokens ({self.output_tokens} > {self.max_tokens})"
        sent = self.sent_tokens or 0
        if sent < len(self.chunk_times_s):
            return f"usage says fewer output tokens than chunks ({sent} < {len(self.chunk_times_s)})"
        return None


@dataclass(frozen=True)
class Interval:
    """A span of time on the records' clock."""

    start_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s

    def contains(self, time_s: float) -> bool:
        return self.start_s <= time_s <= self.end_s

    def share(self, start_s: float, end_s: float) -> float:
        """The part of the span `start_s`..`end_s` that lies inside, between 0 and 1."""
        overlap_s = max(0.0, min(end_s, self.end_s) - max(start_s, self.start_s))
        return overlap_s / (end_s - start_s) if end_s > start_s else float(self.contains(start_s))
