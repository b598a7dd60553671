"""Results of AIPerf: `profile_export.jsonl` (one request a line) or `profile_export_aiperf.json` (sums).

Written from its published schemas (docs: "profile_export_aiperf.json Schema", "Working with Profile Export Files").
Each metric carries its unit. `request_count` counts the requests that were answered, `error_request_count` the others;
it is absent where there are none. A record with `error`, or that was cancelled, is a failure, whatever metrics it has.
"""

from typing import Any

from lowbit_loadtest.compare.side import (
    COMPLETED,
    FAILED,
    OUTPUT_RATE,
    REJECTED,
    At,
    Key,
    Load,
    Request,
    Side,
    counted,
)

TOOL = "AIPerf"
METRICS = {
    "ttft_s": "time_to_first_token",
    "ttfa_s": "time_to_first_output_token",
    "tpot_s": "inter_token_latency",
    "e2e_s": "request_latency",
}
SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "sec": 1.0, "seconds": 1.0}
FULL = (429, 503)

Document = dict[str, Any]


def reads(document: Any) -> bool:
    return _is_records(document) or (
        isinstance(document, dict) and "input_config" in document and "benchmarks" not in document
    )


def _is_records(document: Any) -> bool:
    lines = document if isinstance(document, list) else [document]
    return bool(lines) and all(
        isinstance(line, dict) and {"metadata", "metrics"} <= line.keys() and "benchmarks" not in line
        for line in lines
    )


def read(document: Document | list[Document], name: str) -> Side:
    """The result. The records say nothing of the load that was offered, nor of tokens/s."""
    if isinstance(document, list) or _is_records(document):
        requests = _requests(document if isinstance(document, list) else [document])
        return Side(TOOL, (Load((), counted(requests), requests),), missing=("output tokens/s",))
    found = _load(document)
    notes = ("it was cancelled: its last requests are cut off",) if document.get("was_cancelled") else ()
    missing = "its requests (profile_export.jsonl beside it has them), so its latencies have no intervals"
    return Side(TOOL, (found,), missing=(missing,), notes=notes)


def _requests(lines: list[Document]) -> dict[Key, Request]:
    """Records are written as they end: each is numbered by its session and turn, or else by its line."""
    found: dict[Key, Request] = {}
    for place, line in enumerate(lines):
        about = line["metadata"]
        if about.get("benchmark_phase", "profiling") != "profiling":
            continue
        key = (0, int(about.get("session_num", place)), int(about.get("turn_index") or 0))
        found[key if key not in found else (0, len(lines) + place, 0)] = _request(line)
    return found


def _request(line: Document) -> Request:
    error = line.get("error")
    if error or line["metadata"].get("was_cancelled"):
        return Request(REJECTED if (error or {}).get("code") in FULL else FAILED)
    return Request.of(
        COMPLETED,
        **{ours: _seconds(line["metrics"].get(theirs), "value") for ours, theirs in METRICS.items()},
    )


def _load(document: Document) -> Load:
    completed, errors = (_value(document, name) for name in ("request_count", "error_request_count"))
    rejected = sum(
        one["count"]
        for one in document.get("error_summary") or []
        if (one.get("error_details") or {}).get("code") in FULL
    )
    failed = max(0, round(errors or 0) - rejected)
    statistics = {
        (ours, statistic): value
        for ours, theirs in METRICS.items()
        for statistic in ("p50", "p95")
        if completed and (value := _seconds(document.get(theirs), statistic)) is not None
    }
    rate = _value(document, "output_token_throughput")
    counts = {COMPLETED: round(completed or 0), REJECTED: rejected, FAILED: failed}
    return Load(_at(document), counts, None, statistics, {OUTPUT_RATE: (rate,)} if rate else {})


def _at(document: Document) -> At:
    config = document.get("input_config") or {}
    load = config.get("loadgen") or {}
    if load.get("request_rate"):
        return (("requests/s", float(load["request_rate"])),)
    return (("streams", float(load["concurrency"])),) if load.get("concurrency") else ()


def _value(document: Document, name: str) -> float | None:
    found = (document.get(name) or {}).get("avg")
    return None if found is None else float(found)


def _seconds(metric: Document | None, which: str) -> float | None:
    """A metric's value in seconds; None where it, or a unit of time, is missing."""
    if not metric or metric.get(which) is None or metric.get("unit") not in SECONDS:
        return None
    return float(metric[which]) * SECONDS[metric["unit"]]
