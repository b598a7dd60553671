"""Reports of GuideLLM: `benchmarks.json`, version 2 of its schema.

Written from guidellm/benchmark/schemas and guidellm/schemas. A report has a benchmark for each rate, with the requests
by how they ended: `successful`, `errored`, and `incomplete`, which were in flight when the time was over. Those count
as failed here, as a request that Lowbit's load test cuts off: nobody got an answer. The lists may be samples
(`sample_size`); they are used only if they hold every request. Their `inter_token_latency_ms` is our time per output
token (without the first); their `time_per_output_token_ms` contains the first and has no counterpart.
"""

import re
from collections.abc import Mapping
from typing import Any

from lowbit_core.errors import ConfigError
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

TOOL = "GuideLLM"
VERSIONS = (2,)
METRICS = {
    "ttft_s": ("time_to_first_token_ms", 1e-3),
    "ttfa_s": ("time_to_first_output_token_ms", 1e-3),
    "tpot_s": ("inter_token_latency_ms", 1e-3),
    "e2e_s": ("request_latency", 1.0),
}
STATUSES = ("successful", "errored", "incomplete")
FULL = re.compile(r"\b(429|503)\b")  # in an error's text

Document = dict[str, Any]


def reads(document: Any) -> bool:
    return (
        isinstance(document, dict) and isinstance(document.get("benchmarks"), list) and "metadata" in document
    )


def read(document: Document, name: str) -> Side:
    """The report, a load for each benchmark; ConfigError for another version of the schema."""
    version = document["metadata"].get("version")
    if version not in VERSIONS:
        raise ConfigError(
            f"{name} is a report of GuideLLM's schema {version}; versions that are read: {VERSIONS}"
        )
    loads = tuple(_load(one) for one in document["benchmarks"])
    sampled = any(load.requests is None for load in loads)
    missing = ("some of its requests (sample_size), so its latencies have no intervals",) if sampled else ()
    return Side(TOOL, loads, missing=missing)


def _load(benchmark: Document) -> Load:
    metrics, by_status = benchmark["metrics"], benchmark["requests"]
    totals = {status: metrics["request_totals"].get(status) or 0 for status in STATUSES}
    rate = _successful(metrics.get("output_tokens_per_second")).get("mean")
    per_repetition = {OUTPUT_RATE: (float(rate),)} if rate else {}
    at = _at(benchmark["config"]["strategy"])
    if all(len(by_status.get(status) or []) == totals[status] for status in STATUSES):
        requests = _requests(by_status)
        return Load(at, counted(requests), requests, per_repetition=per_repetition)
    failed = totals["errored"] + totals["incomplete"]
    counts = {COMPLETED: totals["successful"], FAILED: failed}
    return Load(at, counts, None, _statistics(metrics, totals["successful"]), per_repetition)


def _at(strategy: Document) -> At:
    if strategy.get("rate"):
        return (("requests/s", float(strategy["rate"])),)
    if strategy.get("type_") == "synchronous":
        return (("streams", 1.0),)
    streams = strategy.get("streams") or strategy.get("max_concurrency")
    return (("streams", float(streams)),) if streams else ()


def _requests(by_status: Document) -> dict[Key, Request]:
    """Numbered in order of their starts."""
    found = [(_start_s(one), status, one) for status in STATUSES for one in by_status.get(status) or []]
    ordered = sorted(found, key=lambda each: each[0])
    return {(0, place, 0): _request(status, one) for place, (_, status, one) in enumerate(ordered)}


def _start_s(request: Document) -> float:
    return float(request.get("request_start_time") or 0.0)


def _request(status: str, request: Document) -> Request:
    if status != "successful":
        error = str((request.get("info") or {}).get("error") or "")
        return Request(REJECTED if FULL.search(error) else FAILED)
    known = {
        ours: None if request.get(theirs) is None else factor * request[theirs]
        for ours, (theirs, factor) in METRICS.items()
    }
    return Request.of(COMPLETED, **known)


def _statistics(metrics: Document, completed: int) -> dict[tuple[str, str], float]:
    """Of successful requests; their zeros stand for nothing measured."""
    found = {}
    for ours, (theirs, factor) in METRICS.items():
        percentiles = _successful(metrics.get(theirs)).get("percentiles") or {}
        for statistic in ("p50", "p95"):
            if completed and percentiles.get(statistic):
                found[ours, statistic] = factor * percentiles[statistic]
    return found


def _successful(distribution: Document | None) -> Mapping[str, Any]:
    return (distribution or {}).get("successful") or {}
