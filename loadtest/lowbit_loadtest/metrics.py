"""What one request leaves behind, and the statistics of many: pure arithmetic, no HTTP and no clock.

Tokens are counted by the server (`usage.completion_tokens`), never by chunks, because one chunk may carry
several tokens. Latencies are of every completed request: leaving out those in flight at the end would
favour the short ones. Rates and inter-token gaps are of the steady interval only, from the moment when all
C streams are in flight to the moment when no request is left to replace one that ended; a request that lies
partly inside counts with the part inside.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import numpy as np


class Outcome(StrEnum):
    """How a request ended; every request has exactly one."""

    COMPLETED = "completed"  # finish_reason and [DONE] arrived
    REJECTED = "rejected"  # 429 or 503: the server said that it is full
    FAILED = "failed"  # any other status, an error event, or no connection
    CUT_OFF = "cut_off"  # the stream ended without finish_reason or without [DONE]
    TIMED_OUT = "timed_out"  # the client's deadline passed


@dataclass(frozen=True)
class RequestRecord:
    """One request. Times are of one monotonic clock; token counts are the server's, None if not given."""

    outcome: Outcome
    sent_s: float
    ended_s: float
    chunk_times_s: tuple[float, ...] = ()  # arrival of each chunk that carried output
    finished_s: float | None = None  # arrival of finish_reason
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    detail: str = ""

    @property
    def end_to_end_s(self) -> float:
        return self.ended_s - self.sent_s


@dataclass(frozen=True)
class Interval:
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


@dataclass(frozen=True)
class Distribution:
    """Percentiles interpolate linearly between neighbours (numpy's default)."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Summary:
    """The result of a run. None where nothing could be measured; the reason is in the counts beside it."""

    requests: int
    outcomes: dict[str, int]
    details: dict[str, int]  # what went wrong, most frequent first
    finish_reasons: dict[str, int]
    duration_s: float
    steady_interval_s: float
    ttft_s: Distribution | None
    inter_token_latency_s: Distribution | None  # gaps between chunks of one stream
    time_per_output_token_s: Distribution | None  # per request: (last - first) / (output tokens - 1)
    end_to_end_s: Distribution | None
    requests_per_s: float | None
    output_tokens_per_s: float | None
    prompt_tokens: int | None
    output_tokens: int | None
    output_tokens_per_chunk: float | None  # near 1: a gap between chunks is a gap between tokens
    completed_without_usage: int


def steady_interval(records: Sequence[RequestRecord], concurrency: int) -> Interval | None:
    """From the send of request C to the first end that no new request follows; None if that is empty.

    The closed loop holds C requests in flight: all have been sent before number N - C + 1 ends.
    """
    if not 1 <= concurrency <= len(records):
        return None
    start_s = sorted(record.sent_s for record in records)[concurrency - 1]
    end_s = sorted(record.ended_s for record in records)[len(records) - concurrency]
    return Interval(start_s, end_s) if end_s > start_s else None


def distribution(values: Iterable[float]) -> Distribution | None:
    """Mean and percentiles; None of nothing."""
    array = np.fromiter(values, dtype=np.float64)
    if array.size == 0:
        return None
    p50, p95, p99 = (float(value) for value in np.percentile(array, [50, 95, 99]))
    return Distribution(int(array.size), float(array.mean()), p50, p95, p99)


def summarize(records: Sequence[RequestRecord], concurrency: int) -> Summary:
    """Everything that is reported about a closed-loop run with `concurrency` streams."""
    completed = [record for record in records if record.outcome is Outcome.COMPLETED]
    counted = [record for record in completed if record.output_tokens is not None]
    steady = steady_interval(records, concurrency)
    counts = Counter(record.outcome.value for record in records)
    return Summary(
        requests=len(records),
        outcomes={outcome.value: counts[outcome.value] for outcome in Outcome},
        details=dict(Counter(record.detail for record in records if record.detail).most_common()),
        finish_reasons=dict(Counter(record.finish_reason for record in completed if record.finish_reason)),
        duration_s=_duration_s(records),
        steady_interval_s=steady.length_s if steady else 0.0,
        ttft_s=distribution(
            record.chunk_times_s[0] - record.sent_s for record in completed if record.chunk_times_s
        ),
        inter_token_latency_s=distribution(_gaps_s(completed, steady)) if steady else None,
        time_per_output_token_s=distribution(_times_per_output_token_s(counted)),
        end_to_end_s=distribution(record.end_to_end_s for record in completed),
        requests_per_s=_requests_per_s(completed, steady) if steady else None,
        output_tokens_per_s=_output_tokens_per_s(counted, steady)
        if steady and len(counted) == len(completed)
        else None,
        prompt_tokens=_total(record.prompt_tokens for record in completed),
        output_tokens=_total(record.output_tokens for record in completed),
        output_tokens_per_chunk=_output_tokens_per_chunk(counted),
        completed_without_usage=len(completed) - len(counted),
    )


def _duration_s(records: Sequence[RequestRecord]) -> float:
    if not records:
        return 0.0
    return max(record.ended_s for record in records) - min(record.sent_s for record in records)


def _gaps_s(completed: Sequence[RequestRecord], steady: Interval) -> Iterable[float]:
    for record in completed:
        for earlier_s, later_s in pairwise(record.chunk_times_s):
            if steady.contains(earlier_s) and steady.contains(later_s):
                yield later_s - earlier_s


def _times_per_output_token_s(counted: Sequence[RequestRecord]) -> Iterable[float]:
    for record in counted:
        if (
            record.chunk_times_s
            and record.finished_s is not None
            and record.output_tokens
            and record.output_tokens > 1
        ):
            yield (record.finished_s - record.chunk_times_s[0]) / (record.output_tokens - 1)


def _requests_per_s(completed: Sequence[RequestRecord], steady: Interval) -> float:
    return sum(steady.share(record.sent_s, record.ended_s) for record in completed) / steady.length_s


def _output_tokens_per_s(counted: Sequence[RequestRecord], steady: Interval) -> float:
    return sum(_output_tokens_inside(record, steady) for record in counted) / steady.length_s


def _output_tokens_inside(record: RequestRecord, steady: Interval) -> float:
    arrivals_s = record.chunk_times_s or (record.ended_s,)
    inside = sum(steady.contains(arrival_s) for arrival_s in arrivals_s)
    return (record.output_tokens or 0) * inside / len(arrivals_s)


def _output_tokens_per_chunk(counted: Sequence[RequestRecord]) -> float | None:
    chunks = sum(len(record.chunk_times_s) for record in counted)
    return sum(record.output_tokens or 0 for record in counted) / chunks if chunks else None


def _total(counts: Iterable[int | None]) -> int | None:
    """The sum, or None when a request has no count: a partial sum would pass for the whole."""
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)
