"""From records to the numbers of a result: pure arithmetic, no HTTP and no clock.

Tokens are the server's count (`usage.completion_tokens`), never chunks, because one chunk may carry several tokens.
Latencies are those of every completed request after the warm-up; leaving out those in flight at the end would favour
short ones. Rates are computed over a window. In a closed loop it is the steady interval: from when all C streams are in
flight until no request is left to replace one that ended. In an open loop it reaches from the end of the warm-up to the
last scheduled arrival. A request that lies partly within the window counts with that part.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lowbit_loadtest.generate.records import Interval, Outcome, RequestRecord
from lowbit_loadtest.report.statistics import Bounds, Distribution, Sample, bootstrap_mean, distribution
from lowbit_loadtest.scenario import SLO


@dataclass(frozen=True)
class Run:
    """One repetition: its records in order of time, and the window of its rates (None: never steady)."""

    records: tuple[RequestRecord, ...]
    window: Interval | None
    closed: bool = False
    not_sent: int = 0
    heartbeat_lags_s: tuple[float, ...] = ()

    @property
    def measured(self) -> list[RequestRecord]:
        return [record for record in self.records if not record.warm_up]


@dataclass(frozen=True)
class Lag:
    """How late the generator was, in seconds: its sends against the schedule, its event loops against a heartbeat."""

    send_p50: float | None
    send_p99: float | None
    send_max: float | None
    loop_p50: float | None
    loop_p99: float | None
    loop_max: float | None

    def worst_p99(self) -> float:
        return max(self.send_p99 or 0.0, self.loop_p99 or 0.0)


@dataclass(frozen=True)
class Summary:
    """The result at one rate. None where nothing could be measured; the reason is in the counts beside it."""

    requests: int  # sent, warm-up included; `outcomes` adds up to it
    outcomes: dict[str, int]
    not_sent: int  # scheduled, but an earlier turn failed or the run was interrupted
    warm_up_requests: int
    details: dict[str, int]  # what went wrong, most frequent first
    finish_reasons: dict[str, int]
    duration_s: float
    steady_interval_s: float  # of the windows of all repetitions
    ttft_s: Distribution | None
    time_to_first_answer_s: Distribution | None  # to the first output that is not reasoning
    inter_token_latency_s: Distribution | None  # gaps between chunks of one stream
    time_per_output_token_s: Distribution | None  # per request: (last - first) / (tokens that were sent - 1)
    end_to_end_s: Distribution | None
    requests_per_s: float | None
    output_tokens_per_s: float | None
    total_tokens_per_s: float | None  # prompt and output
    goodput_rps: float | None  # completed within every SLO
    slo_attainment: float | None  # share of measured requests that are
    rate_intervals: dict[str, Bounds]  # over repetitions
    repetition_rates: list[dict[str, float | None]]
    prompt_tokens: int | None
    output_tokens: int | None
    output_tokens_per_chunk: float | None  # near 1: a gap between chunks is a gap between tokens
    most_tokens_in_a_chunk: int | None  # where the server counts as it goes
    hidden_reasoning_tokens: int  # of the output tokens: thought by the server and not sent
    completed_without_usage: int
    notes: dict[str, int]  # completed requests of which something must be known, by what that is
    contradictions: dict[str, int]  # answers whose usage cannot be true
    lag_s: Lag


RATES = ("requests_per_s", "output_tokens_per_s", "total_tokens_per_s", "goodput_rps", "slo_attainment")


def steady_interval(records: Sequence[RequestRecord], concurrency: int) -> Interval | None:
    """From the send of request C to the first end that no new request follows; None if that is empty.

    The closed loop holds C requests in flight: all have been sent before number N - C + 1 ends.
    """
    if not 1 <= concurrency <= len(records):
        return None
    start_s = sorted(record.sent_s for record in records)[concurrency - 1]
    end_s = sorted(record.ended_s for record in records)[len(records) - concurrency]
    measured_s = min((record.sent_s for record in records if not record.warm_up), default=start_s)
    start_s = max(start_s, measured_s)
    return Interval(start_s, end_s) if end_s > start_s else None


def arrival_window(records: Sequence[RequestRecord], planned_end_s: float | None) -> Interval | None:
    """An open loop's window: from the first arrival after the warm-up to the scheduled end, or to the last arrival."""
    due_s = [record.due_s for record in records if not record.warm_up]
    if not due_s:
        return None
    end_s = planned_end_s or max(due_s)
    return Interval(min(due_s), end_s) if end_s > min(due_s) else None


def whole_span(records: Sequence[RequestRecord]) -> Interval | None:
    """From the first send to the last end: the window of requests that are all sent at once."""
    if not records:
        return None
    return Interval(min(record.sent_s for record in records), max(record.ended_s for record in records))


def summarize(runs: Sequence[Run], slo: SLO | None = None, intervals: bool = True) -> Summary:
    """Everything that is reported about the repetitions of one rate."""
    records = [record for run in runs for record in run.records]
    measured = [record for run in runs for record in run.measured]
    completed = [record for record in measured if record.outcome is Outcome.COMPLETED]
    counted = [record for record in completed if record.output_tokens is not None]
    outcomes = Counter(record.outcome.value for record in records)
    rates = [_rates(run, slo or SLO()) for run in runs]
    means = {name: _mean(rate[name] for rate in rates) for name in RATES}

    def spread(values: "ValuesOf") -> Distribution | None:
        return distribution([_sample(run, values) for run in runs], intervals=intervals)

    return Summary(
        requests=len(records),
        outcomes={outcome.value: outcomes[outcome.value] for outcome in Outcome},
        not_sent=sum(run.not_sent for run in runs),
        warm_up_requests=len(records) - len(measured),
        details=dict(Counter(record.detail for record in records if record.detail).most_common()),
        finish_reasons=dict(Counter(record.finish_reason for record in completed if record.finish_reason)),
        duration_s=sum(_duration_s(run.records) for run in runs),
        steady_interval_s=sum(run.window.length_s for run in runs if run.window),
        ttft_s=spread(lambda run, record: _known(record.ttft_s)),
        time_to_first_answer_s=spread(lambda run, record: _known(record.time_to_first_answer_s)),
        inter_token_latency_s=spread(_gaps_s),
        time_per_output_token_s=spread(lambda run, record: _known(record.time_per_output_token_s)),
        end_to_end_s=spread(lambda run, record: [record.end_to_end_s]),
        **means,
        rate_intervals=_rate_intervals(rates),
        repetition_rates=rates,
        prompt_tokens=_total(record.prompt_tokens for record in completed),
        output_tokens=_total(record.output_tokens for record in completed),
        output_tokens_per_chunk=_output_tokens_per_chunk(counted),
        most_tokens_in_a_chunk=max((count for one in counted for count in one.chunk_tokens), default=None),
        hidden_reasoning_tokens=sum(record.hidden_tokens for record in counted),
        completed_without_usage=len(completed) - len(counted),
        notes=dict(Counter(note for record in records for note in record.notes).most_common()),
        contradictions=dict(Counter(text for record in records if (text := record.contradiction))),
        lag_s=lag(runs),
    )


ValuesOf = Callable[[Run, RequestRecord], Sequence[float]]


def _sample(run: Run, values: ValuesOf) -> Sample:
    completed = [record for record in run.measured if record.outcome is Outcome.COMPLETED]
    return Sample.of([values(run, record) for record in sorted(completed, key=lambda record: record.due_s)])


def _known(value: float | None) -> Sequence[float]:
    return () if value is None else (value,)


def _gaps_s(run: Run, record: RequestRecord) -> Sequence[float]:
    """All gaps of an open loop; those of a closed loop that lie in its steady interval."""
    pairs = pairwise(record.chunk_times_s)
    if not run.closed:
        return [later_s - earlier_s for earlier_s, later_s in pairs]
    window = run.window
    if window is None:
        return ()
    return [
        later - earlier for earlier, later in pairs if window.contains(earlier) and window.contains(later)
    ]


def is_good(record: RequestRecord, slo: SLO) -> bool:
    """Completed within every limit; a time that is limited and not known is not within it.

    Without usage, or for one token, the time per token is that of chunks; one chunk or token has none to exceed.
    """
    if record.outcome is not Outcome.COMPLETED:
        return False
    tpot_s = record.time_per_output_token_s
    if tpot_s is None:
        tpot_s = _time_per_chunk_s(record)
    seen = {"ttft_s": record.ttft_s, "tpot_s": tpot_s, "e2e_s": record.end_to_end_s}
    return all((value := seen[name]) is not None and value <= limit for name, limit in slo.limits_s.items())


def _time_per_chunk_s(record: RequestRecord) -> float | None:
    """None of an answer that did not come as a stream and is more than a token, or nobody knows how many."""
    chunks_s = record.chunk_times_s
    if len(chunks_s) > 1:
        return (chunks_s[-1] - chunks_s[0]) / (len(chunks_s) - 1)
    few = record.output_tokens is not None and record.output_tokens <= 1
    return 0.0 if chunks_s or few else None


def _rates(run: Run, slo: SLO) -> dict[str, float | None]:
    """One repetition's rates. Tokens are unknown, rather than partial, when one answer came without usage."""
    measured = run.measured
    has_slo = bool(slo.limits_s)
    attained = (
        sum(is_good(record, slo) for record in measured) / len(measured) if measured and has_slo else None
    )
    rates: dict[str, float | None] = dict.fromkeys(RATES)
    rates["slo_attainment"] = attained
    if run.window is None:
        return rates
    window = run.window
    completed = [record for record in run.records if record.outcome is Outcome.COMPLETED]
    good = [record for record in completed if is_good(record, slo)]
    rates["requests_per_s"] = _requests_per_s(completed, window)
    rates["goodput_rps"] = _requests_per_s(good, window) if has_slo else None
    if all(record.output_tokens is not None for record in completed):
        output = sum(_output_tokens_inside(record, window) for record in completed) / window.length_s
        prompt = sum(
            (record.prompt_tokens or 0) * window.contains(_prompt_done_s(record)) for record in completed
        )
        rates["output_tokens_per_s"] = output
        rates["total_tokens_per_s"] = output + prompt / window.length_s
    return rates


def _requests_per_s(records: Sequence[RequestRecord], window: Interval) -> float:
    return sum(window.share(record.sent_s, record.ended_s) for record in records) / window.length_s


def _output_tokens_inside(record: RequestRecord, window: Interval) -> float:
    arrivals_s = record.chunk_times_s or (record.ended_s,)
    inside = sum(window.contains(arrival_s) for arrival_s in arrivals_s)
    return (record.output_tokens or 0) * inside / len(arrivals_s)


def _prompt_done_s(record: RequestRecord) -> float:
    return record.chunk_times_s[0] if record.chunk_times_s else record.ended_s


def _rate_intervals(rates: Sequence[dict[str, float | None]]) -> dict[str, Bounds]:
    intervals = {}
    for name in RATES:
        values = [value for rate in rates if (value := rate[name]) is not None]
        if len(values) == len(rates) and (bounds := bootstrap_mean(values)) is not None:
            intervals[name] = bounds
    return intervals


def lag(runs: Sequence[Run]) -> Lag:
    """Lags of all repetitions together; those of sends are unknown in a closed loop, which has no schedule."""
    sends = [
        record.sent_s - record.intended_s
        for run in runs
        for record in run.records
        if record.intended_s is not None
    ]
    beats = [lag_s for run in runs for lag_s in run.heartbeat_lags_s]
    return Lag(*_lag_points(sends), *_lag_points(beats))


def _lag_points(lags_s: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    if not lags_s:
        return None, None, None
    p50, p99 = np.percentile(lags_s, [50, 99])
    return float(p50), float(p99), max(lags_s)


def _duration_s(records: Sequence[RequestRecord]) -> float:
    if not records:
        return 0.0
    return max(record.ended_s for record in records) - min(record.due_s for record in records)


def _output_tokens_per_chunk(counted: Sequence[RequestRecord]) -> float | None:
    chunks = sum(len(record.chunk_times_s) for record in counted)
    return sum(record.sent_tokens or 0 for record in counted) / chunks if chunks else None


def _total(counts: Iterable[int | None]) -> int | None:
    """The sum, or None when a request has no count: a partial sum would pass for the whole."""
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)


def _mean(values: Iterable[float | None]) -> float | None:
    known = list(values)
    if not known or None in known:
        return None
    return float(np.mean([value for value in known if value is not None]))
