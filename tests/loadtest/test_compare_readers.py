"""What AIPerf, GuideLLM and vllm bench serve write is read as what it says: small files by their schemas, made here."""

import json
from pathlib import Path
from typing import Any

import pytest

from lowbit_core.errors import ConfigError
from lowbit_loadtest.compare.comparison import compare
from lowbit_loadtest.compare.reading import read_result
from lowbit_loadtest.compare.side import Side

TTFTS_S = [0.1 + 0.001 * place for place in range(40)]


def vllm_bench(
    detailed: bool = True, failures: int = 0, factor: float = 1.0, **changes: Any
) -> dict[str, Any]:
    """40 requests of 11 tokens with gaps of 10 ms, of which the last ones failed at once."""
    good = 40 - failures
    ttfts = [factor * one for one in TTFTS_S[:good]] + [0.0] * failures
    found: dict[str, Any] = {
        "backend": "openai-chat",
        "num_prompts": 40,
        "request_rate": 4.0,
        "max_concurrency": None,
        "duration": 10.0,
        "completed": good,
        "failed": failures,
        "request_throughput": good / 10,
        "output_throughput": 11 * good / 10,
        "latencies": [one + 0.1 for one in ttfts[:good]] + [0.001] * failures,
        "median_ttft_ms": 119.5 * factor if good else 0.0,
        "p99_ttft_ms": 139.0 * factor if good else 0.0,
        "median_e2el_ms": 219.5 if good else 0.0,
    }
    if detailed:
        found |= {
            "ttfts": ttfts,
            "itls": [[0.01] * 10] * good + [[]] * failures,
            "output_lens": [11] * good + [0] * failures,
            "errors": [""] * good + ["Too Many Requests"] * failures,
        }
    return found | changes


def aiperf_record(place: int, error: Any = None, **about: Any) -> dict[str, Any]:
    ttft_ms = 1000 * TTFTS_S[place % 40]
    metrics = {
        "time_to_first_token": {"value": ttft_ms, "unit": "ms"},
        "request_latency": {"value": 1e6 * (ttft_ms + 100), "unit": "ns"},
        "inter_token_latency": {"value": 10.0, "unit": "ms"},
        "inter_chunk_latency": {"value": [10.0, 10.0], "unit": "ms"},
    }
    metadata = {"session_num": place, "turn_index": 0, "benchmark_phase": "profiling", "was_cancelled": False}
    return {"metadata": metadata | about, "metrics": metrics, "error": error}


def aiperf_summary(**changes: Any) -> dict[str, Any]:
    found = {
        "input_config": {"loadgen": {"concurrency": 4}},
        "request_count": {"unit": "requests", "avg": 38.0},
        "error_request_count": {"unit": "requests", "avg": 2.0},
        "error_summary": [{"error_details": {"code": 429, "type": "HTTP", "message": "full"}, "count": 1}],
        "time_to_first_token": {"unit": "ms", "avg": 120.0, "p50": 119.5, "p95": 137.0},
        "output_token_throughput": {"unit": "tokens/sec", "avg": 44.0},
        "was_cancelled": False,
    }
    return found | changes


def guidellm(totals: dict[str, int] | None = None, **strategy: Any) -> dict[str, Any]:
    def one(place: int, error: str | None = None) -> dict[str, Any]:
        ttft_s = TTFTS_S[place]
        return {
            "request_start_time": 100.0 + place,
            "request_latency": ttft_s + 0.1,
            "time_to_first_token_ms": 1000 * ttft_s,
            "time_to_first_output_token_ms": 1000 * ttft_s + 5,
            "inter_token_latency_ms": 10.0,
            "time_per_output_token_ms": 19.0,
            "info": {"error": error},
        }

    requests = {
        "successful": [one(place) for place in range(36)],
        "errored": [
            one(36, "Client error '429 Too Many Requests'"),
            one(37, "Server error '500' on port 4290"),
        ],
        "incomplete": [one(38)],
    }
    metrics = {
        "request_totals": totals or {name: len(found) for name, found in requests.items()},
        "time_to_first_token_ms": {"successful": {"percentiles": {"p50": 118.0, "p95": 134.0}}},
        "output_tokens_per_second": {"successful": {"mean": 40.0}},
    }
    config = {"strategy": strategy or {"type_": "constant", "rate": 4.0}}
    benchmark = {"type_": "generative_benchmark", "config": config, "metrics": metrics, "requests": requests}
    return {"metadata": {"version": 2}, "config": {}, "benchmarks": [benchmark]}


def read(folder: Path, content: Any, lines: bool = False) -> Side:
    path = folder / "result.json"
    path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content))
    return read_result(path)


def test_vllm_bench_with_details_has_requests_and_failures_have_no_times(tmp_path: Path) -> None:
    side = read(tmp_path, vllm_bench(failures=4))
    (load,) = side.loads
    assert (side.tool, side.missing, load.at) == ("vllm bench serve", (), (("requests/s", 4.0),))
    assert (load.counts["completed"], load.counts["rejected"], load.counts["failed"]) == (36, 4, 0)
    assert load.requests is not None
    assert load.requests[0, 3, 0].latencies_s == pytest.approx(
        {"ttft_s": 0.103, "tpot_s": 0.01, "e2e_s": 0.203}
    )
    assert not load.requests[0, 39, 0].latencies_s


def test_vllm_bench_without_details_has_only_what_it_says(tmp_path: Path) -> None:
    """Its list of latencies holds failures too, and nothing says which."""
    side = read(tmp_path, vllm_bench(detailed=False, failures=4))
    (load,) = side.loads
    assert load.requests is None
    assert load.statistics == pytest.approx({("ttft_s", "p50"): 0.1195, ("e2e_s", "p50"): 0.2195})
    assert "--save-detailed" in side.missing[0]
    nothing = read(tmp_path, vllm_bench(detailed=False, failures=40)).loads[0]
    assert (nothing.statistics, nothing.counts["completed"]) == ({}, 0)
    older = vllm_bench(detailed=False, completed=30)
    del older["failed"]
    assert read(tmp_path, older).loads[0].counts["failed"] == 10


def test_vllm_bench_failures_without_a_reason_are_known_by_their_missing_output(tmp_path: Path) -> None:
    silent = read(tmp_path, vllm_bench(failures=4, errors=[""] * 40))
    assert silent.loads[0].counts["failed"] == 4
    unclear = read(tmp_path, vllm_bench(failures=4, errors=[""] * 40, output_lens=[11] * 40))
    assert unclear.loads[0].requests is None
    assert unclear.loads[0].counts["failed"] == 4
    assert "which of its requests failed" in unclear.missing[0]


def test_vllm_bench_lines_of_one_load_are_repetitions(tmp_path: Path) -> None:
    side = read(
        tmp_path, [vllm_bench(), vllm_bench(), vllm_bench(request_rate="inf", max_concurrency=8)], lines=True
    )
    assert [(load.at, load.total) for load in side.loads] == [
        ((("requests/s", 4.0),), 80),
        ((("streams", 8.0),), 40),
    ]


def test_an_endpoint_that_does_not_stream_has_no_first_token(tmp_path: Path) -> None:
    side = read(tmp_path, vllm_bench(ttfts=[0.0] * 40, itls=[[]] * 40))
    assert side.loads[0].requests is not None
    assert set(side.loads[0].requests[0, 0, 0].latencies_s) == {"e2e_s"}


def test_aiperf_records_are_requests_in_their_own_units(tmp_path: Path) -> None:
    refused = {"code": 429, "type": "HTTP", "message": "full"}
    records = [
        aiperf_record(0),
        aiperf_record(1, refused),
        aiperf_record(2, {"code": 500}),
        aiperf_record(3, was_cancelled=True),
        aiperf_record(4, benchmark_phase="warmup"),
    ]
    side = read(tmp_path, records, lines=True)
    (load,) = side.loads
    assert side.tool == "AIPerf"
    assert (load.counts["completed"], load.counts["rejected"], load.counts["failed"]) == (1, 1, 2)
    assert load.requests is not None
    assert load.requests[0, 0, 0].latencies_s == pytest.approx({"ttft_s": 0.1, "tpot_s": 0.01, "e2e_s": 0.2})
    assert read(tmp_path, records[0]).loads[0].counts["completed"] == 1  # a file of one line is one object


def test_aiperf_sums_say_which_file_has_the_requests(tmp_path: Path) -> None:
    side = read(tmp_path, aiperf_summary())
    (load,) = side.loads
    assert (load.counts["completed"], load.counts["rejected"], load.counts["failed"]) == (38, 1, 1)
    assert load.statistics == pytest.approx({("ttft_s", "p50"): 0.1195, ("ttft_s", "p95"): 0.137})
    assert load.at == (("streams", 4.0),)
    assert "profile_export.jsonl" in side.missing[0]
    nothing = read(tmp_path, aiperf_summary(request_count=None, time_to_first_token=None))
    assert nothing.completed == 0


def test_guidellm_counts_what_was_in_flight_at_the_end_as_failed(tmp_path: Path) -> None:
    (load,) = read(tmp_path, guidellm()).loads
    assert (load.counts["completed"], load.counts["rejected"], load.counts["failed"]) == (36, 1, 2)
    assert load.requests is not None
    first = load.requests[0, 0, 0].latencies_s
    assert first == pytest.approx({"ttft_s": 0.1, "ttfa_s": 0.105, "tpot_s": 0.01, "e2e_s": 0.2})
    assert read(tmp_path, guidellm(type_="concurrent", streams=8)).loads[0].at == (("streams", 8.0),)


def test_guidellm_samples_are_not_taken_for_all_requests(tmp_path: Path) -> None:
    side = read(tmp_path, guidellm({"successful": 360, "errored": 20, "incomplete": 10}))
    (load,) = side.loads
    assert (load.requests, load.counts["completed"], load.counts["failed"]) == (None, 360, 30)
    assert load.statistics == pytest.approx({("ttft_s", "p50"): 0.118, ("ttft_s", "p95"): 0.134})
    assert "sample_size" in side.missing[0]


def test_files_of_two_tools_are_compared_and_say_so(tmp_path: Path) -> None:
    fast, slow = (read(tmp_path, vllm_bench(factor=factor)) for factor in (1.0, 3.0))
    assert compare(fast, slow, 0.05).verdict == "worse"
    found = compare(read(tmp_path, guidellm()), fast, 0.05)
    assert not found.paired
    assert any("definitions are not quite the same" in note for note in found.notes)
    sums = compare(read(tmp_path, aiperf_summary()), slow, 0.05)
    assert {one.verdict for one in sums.differences} == {"undecided"}
    assert sums.differences[0].interval is None


@pytest.mark.parametrize("detailed", [True, False])
def test_a_file_whose_every_request_failed_has_a_verdict_of_its_own(detailed: bool, tmp_path: Path) -> None:
    good, bad = (read(tmp_path, vllm_bench(detailed, failures)) for failures in (0, 40))
    assert compare(good, bad, 0.05).verdict == "b_completed_nothing"
    assert compare(bad, good, 0.05).verdict == "a_completed_nothing"


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "null", "7", '"text"', "{}\n{}", '{"kind": "lowbit.frontier"}', '{"benchmarks": []}',
        '{"benchmarks": [{}], "metadata": {"version": 2}}', '{"benchmarks": [], "metadata": {"version": 1}}',
        '{"completed": 1, "request_throughput": 1, "duration": 1, "ttfts": [0.1], "itls": [], "output_lens": [1], '
        '"errors": [""]}',
        '{"metadata": null, "metrics": {}}\n{"metadata": null, "metrics": {}}',
    ],
)  # fmt: skip
def test_other_files_and_cut_ones_are_refused_in_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"other\.json (is|cannot|looks|has)") as refused:
        read_result(path)
    assert "\n" not in str(refused.value)
