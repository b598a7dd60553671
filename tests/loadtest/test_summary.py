"""The statistics against cases computed by hand and against the obvious slow version."""

import heapq
import random

import pytest

from lowbit_loadtest.generate.records import Interval, Outcome, RequestRecord
from lowbit_loadtest.report.statistics import Sample, distribution
from lowbit_loadtest.report.summary import Run, Summary, arrival_window, is_good, lag, steady_interval
from lowbit_loadtest.report.summary import summarize as summarize_runs
from lowbit_loadtest.scenario import SLO


def record(
    sent_s: float, ended_s: float, outcome: Outcome = Outcome.COMPLETED, **fields: object
) -> RequestRecord:
    return RequestRecord(outcome, sent_s, ended_s, **fields)  # type: ignore[arg-type]


def summarize(records: list[RequestRecord], concurrency: int) -> Summary:
    return summarize_runs([Run(tuple(records), steady_interval(records, concurrency), closed=True)])


def two_streams() -> list[RequestRecord]:
    """C = 2, N = 4: 0–2 then 2–5 on one stream, 0.5–3 then 3–4 on the other; steady from 0.5 to 4."""
    return [
        record(0.0, 2.0, chunk_times_s=(0.25, 1.0, 2.0), finished_s=2.0, output_tokens=6, prompt_tokens=10),
        record(0.5, 3.0, chunk_times_s=(1.5, 3.0), finished_s=3.0, output_tokens=4, prompt_tokens=10),
        record(2.0, 5.0, chunk_times_s=(3.0, 4.5, 5.0), finished_s=5.0, output_tokens=3, prompt_tokens=10),
        record(3.0, 4.0, chunk_times_s=(4.0,), finished_s=4.0, output_tokens=1, prompt_tokens=10),
    ]


def test_percentiles_interpolate_as_computed_by_hand() -> None:
    values = distribution([Sample.of([[5.0], [1.0, 3.0], [2.0, 4.0]])])
    assert values is not None
    assert (values.count, values.mean, values.p50) == (5, 3.0, 3.0)
    assert values.p95 == pytest.approx(4.8)  # rank 0.95 * 4 = 3.8 lies between 4 and 5
    assert values.p99 == pytest.approx(4.96)


def test_distribution_of_nothing_is_none_rather_than_nan() -> None:
    assert distribution([]) is None
    assert distribution([Sample.of([[], []])]) is None


def test_steady_interval_and_rates_equal_the_hand_computed_case() -> None:
    assert steady_interval(two_streams(), 2) == Interval(0.5, 4.0)
    summary = summarize(two_streams(), 2)
    assert summary.requests_per_s == pytest.approx((1.5 / 2 + 1 + 2 / 3 + 1) / 3.5)
    # Tokens by the share of a request's chunks inside: 2 of 3, 2 of 2, 1 of 3, 1 of 1.
    assert summary.output_tokens_per_s == pytest.approx((6 * 2 / 3 + 4 + 3 * 1 / 3 + 1) / 3.5)
    assert summary.output_tokens_per_chunk == pytest.approx(14 / 9)
    assert (summary.output_tokens, summary.prompt_tokens) == (14, 40)


def test_latencies_equal_the_hand_computed_case() -> None:
    summary = summarize(two_streams(), 2)
    assert summary.ttft_s is not None
    assert summary.ttft_s.mean == pytest.approx((0.25 + 1.0 + 1.0 + 1.0) / 4)
    assert summary.end_to_end_s is not None
    assert summary.end_to_end_s.p50 == pytest.approx(2.25)  # of 1, 2, 2.5, 3
    assert summary.inter_token_latency_s is not None
    assert (summary.inter_token_latency_s.count, summary.inter_token_latency_s.mean) == (2, 1.25)
    assert summary.time_per_output_token_s is not None
    assert summary.time_per_output_token_s.mean == pytest.approx((1.75 / 5 + 1.5 / 3 + 2.0 / 2) / 3)


@pytest.mark.parametrize("seed", range(20))
def test_all_streams_are_in_flight_throughout_the_steady_interval(seed: int) -> None:
    rng = random.Random(seed)
    concurrency, requests = rng.randint(1, 8), 40
    records, free = [], [rng.random() * 0.01 for _ in range(concurrency)]
    for _ in range(requests):
        sent_s = heapq.heappop(free)
        records.append(record(sent_s, sent_s + rng.expovariate(1.0) + 0.02))
        heapq.heappush(free, records[-1].ended_s)
    steady = steady_interval(records, concurrency)
    assert steady is not None
    for _ in range(200):
        moment_s = rng.uniform(steady.start_s, steady.end_s)
        assert sum(one.sent_s <= moment_s < one.ended_s for one in records) == concurrency
    assert sum(one.sent_s <= steady.end_s < one.ended_s for one in records) == concurrency - 1


def test_waves_in_step_give_the_true_rate() -> None:
    waves = [record(float(wave), wave + 1.0) for wave in range(5) for _ in range(4)]
    assert summarize(waves, 4).requests_per_s == pytest.approx(4.0)


def test_only_completed_requests_count_as_throughput_and_latency() -> None:
    records = [
        record(0.0, 1.0, output_tokens=5),
        record(1.0, 2.0, Outcome.REJECTED, detail="status 429: full"),
    ]
    summary = summarize(records, 1)
    assert summary.outcomes == {"completed": 1, "rejected": 1, "failed": 0, "cut_off": 0, "timed_out": 0}
    assert (summary.requests_per_s, summary.output_tokens_per_s) == (0.5, 2.5)
    assert summary.end_to_end_s is not None
    assert summary.end_to_end_s.count == 1
    assert summary.details == {"status 429: full": 1}


def test_tokens_are_unknown_rather_than_partial_when_one_answer_has_no_usage() -> None:
    summary = summarize([record(0.0, 1.0, output_tokens=5), record(1.0, 2.0)], 1)
    assert summary.completed_without_usage == 1
    assert (summary.output_tokens, summary.output_tokens_per_s) == (None, None)


def test_rates_are_unknown_when_the_streams_were_never_all_in_flight() -> None:
    summary = summarize([record(0.0, 1.0), record(2.0, 3.0)], 2)
    assert (summary.steady_interval_s, summary.requests_per_s) == (0.0, None)


def open_record(due_s: float, ttft_s: float, end_to_end_s: float, **fields: object) -> RequestRecord:
    times: dict[str, object] = {
        "chunk_times_s": (due_s + ttft_s, due_s + end_to_end_s),
        "finished_s": due_s + end_to_end_s,
        "intended_s": due_s,
        "output_tokens": 3,
    }
    return record(due_s + 0.001, due_s + end_to_end_s, **(times | fields))  # type: ignore[arg-type]


def test_latency_counts_from_the_intended_send() -> None:
    late = RequestRecord(Outcome.COMPLETED, 3.0, 4.0, (3.5,), intended_s=1.0)
    assert (late.ttft_s, late.end_to_end_s) == (2.5, 3.0)


def test_open_loop_rates_are_of_the_window_after_the_warm_up() -> None:
    records = [open_record(float(at), 0.1, 0.5, warm_up=at < 2) for at in range(10)]
    window = arrival_window(records, None)
    assert window == Interval(2.0, 9.0)
    summary = summarize_runs([Run(tuple(records), window)], SLO(ttft_s=0.2))
    assert summary.requests == 10
    assert summary.warm_up_requests == 2
    # Seven of the eight lie inside from their send (0.001 s after they were due) to their end.
    assert summary.requests_per_s == pytest.approx(7 / 7)
    assert summary.output_tokens_per_s == pytest.approx(3 * 7 / 7)
    assert summary.slo_attainment == 1.0
    assert summary.ttft_s is not None
    assert summary.ttft_s.count == 8


def test_good_is_completed_within_every_limit() -> None:
    one = open_record(0.0, 0.1, 0.5)  # (0.5 - 0.1) / 2 = 0.2 s a token
    assert is_good(one, SLO(ttft_s=0.1, tpot_s=0.2, e2e_s=0.5))
    assert not is_good(one, SLO(ttft_s=0.09))
    assert not is_good(one, SLO(tpot_s=0.19))
    assert not is_good(one, SLO(e2e_s=0.49))
    assert not is_good(record(0.0, 0.1, Outcome.CUT_OFF, chunk_times_s=(0.05,)), SLO(ttft_s=1))


def test_a_time_per_token_that_is_not_known_is_not_within_a_limit() -> None:
    """An answer that was not streamed has none, and counted as one of 0 s."""
    slow = record(0.0, 60.0, output_tokens=100)
    assert not is_good(slow, SLO(tpot_s=0.1))
    assert not is_good(record(0.0, 60.0), SLO(tpot_s=0.1))
    assert is_good(slow, SLO(e2e_s=60))
    assert is_good(record(0.0, 1.0, output_tokens=1), SLO(tpot_s=0.1))
    assert is_good(record(0.0, 1.0, chunk_times_s=(0.5,)), SLO(tpot_s=0.1))


def test_rejected_requests_lower_the_attainment() -> None:
    records = (open_record(0.0, 0.1, 0.5), record(1.0, 1.1, Outcome.REJECTED, intended_s=1.0))
    summary = summarize_runs([Run(records, Interval(0.0, 2.0))], SLO(ttft_s=1.0))
    assert summary.slo_attainment == 0.5


@pytest.mark.parametrize(
    ("tokens", "limit", "text"),
    [(3, 8, "fewer output tokens than chunks"), (9, 8, "more output tokens than max")],
)
def test_usage_that_cannot_be_true_is_named(tokens: int, limit: int, text: str) -> None:
    chunks = (0.1, 0.2, 0.3, 0.4)
    one = record(0.0, 1.0, chunk_times_s=chunks, output_tokens=tokens, max_tokens=limit)
    assert text in (one.contradiction or "")
    assert record(0.0, 1.0, chunk_times_s=chunks, output_tokens=4, max_tokens=4).contradiction is None


def test_lag_is_of_sends_against_the_plan_and_of_the_loops() -> None:
    records = tuple(record(at + 0.002, at + 1, intended_s=float(at)) for at in range(5))
    seen = lag([Run(records, None, heartbeat_lags_s=(0.0, 0.004))])
    assert seen.send_p99 == pytest.approx(0.002)
    assert seen.loop_p50 == pytest.approx(0.002)
    assert seen.loop_max == 0.004
    assert seen.worst_p99() == pytest.approx(0.00396)
