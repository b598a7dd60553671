"""The result for programs (one JSON object) and for people (a few lines). It formats and computes nothing."""

import json
import os
import platform
from dataclasses import asdict, fields
from typing import Any

import httpx

from lowbit_core import __version__
from lowbit_loadtest.metrics import Run, Summary
from lowbit_loadtest.quality_report import quality_document, quality_lines
from lowbit_loadtest.records import RequestRecord
from lowbit_loadtest.runner import Point, Result
from lowbit_loadtest.scenario import Scenario
from lowbit_loadtest.search import bracket
from lowbit_loadtest.statistics import Distribution

FORMAT_VERSION = 2
REQUEST_COLUMNS = (
    "repetition", "index", "turn", "warm_up", "outcome", "due_s", "lag_s", "ttft_s", "tpot_s", "e2e_s",
    "prompt_tokens", "output_tokens", "chunks",
)  # fmt: skip


def as_document(scenario: Scenario, result: Result, started: str, requests: bool = False) -> dict[str, Any]:
    """The result: what was asked, by what client, and what was measured, at each rate.

    The first point's numbers also stand at the top: most runs have one. With `requests`, each point has a table of
    its requests, which `lowbit compare` pairs.
    """
    points = [_point(point, scenario, requests) for point in result.points]
    first = asdict(result.points[0].summary) if len(points) == 1 else {}
    return {
        "kind": "lowbit.loadtest",
        "format_version": FORMAT_VERSION,
        "started": started,
        "target": result.target.url,
        "model": result.target.model,
        "scenario": scenario.model_dump(mode="json"),
        "client": {
            "lowbit": __version__,
            "python": platform.python_version(),
            "httpx": httpx.__version__,
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "workers": result.workers,
            "prompt_tokens_counted_by": result.counted_by,
        },
        "interrupted": result.interrupted,
        "valid": all(point.valid for point in result.points),
        "invalid_because": [reason for point in result.points for reason in point.invalid_because],
        "highest_rate": highest_rate(scenario, result.points),
        "quality": quality_document(result.quality, requests) if result.quality else None,
        **first,
        "points": points,
    }


def highest_rate(scenario: Scenario, points: tuple[Point, ...]) -> dict[str, float | None] | None:
    """Between which rates the SLOs begin to be missed; None for a run that does not vary its rate."""
    if len(points) < 2 or not scenario.slo.limits_s:
        return None
    seen = [(point.offered_rps or 0.0, point.meets(scenario) and point.valid) for point in points]
    meets, misses = bracket(seen)
    return {"meets_slo_rps": meets, "misses_slo_rps": misses}


def _point(point: Point, scenario: Scenario, requests: bool) -> dict[str, Any]:
    return {
        "offered_rps": point.offered_rps,
        "valid": point.valid,
        "invalid_because": list(point.invalid_because),
        "meets_slo": point.meets(scenario) if scenario.slo.limits_s else None,
        **asdict(point.summary),
        "server": list(point.server),
        "usage_check": [asdict(check) for check in point.usage],
        **({"request_table": request_table(point.runs)} if requests else {}),
    }


def request_table(runs: tuple[Run, ...]) -> dict[str, Any]:
    """All requests as rows of `REQUEST_COLUMNS`; times are relative to the repetition's first request."""
    rows = [
        _request_row(repetition, record, run.records[0].due_s)
        for repetition, run in enumerate(runs)
        for record in run.records
    ]
    return {"columns": list(REQUEST_COLUMNS), "rows": rows}


def _request_row(repetition: int, record: RequestRecord, start_s: float) -> list[Any]:
    return [
        repetition,
        record.index,
        record.turn,
        record.warm_up,
        record.outcome.value,
        round(record.due_s - start_s, 6),
        round(record.sent_s - record.due_s, 6),
        _rounded(record.ttft_s),
        _rounded(record.time_per_output_token_s),
        _rounded(record.end_to_end_s),
        record.prompt_tokens,
        record.output_tokens,
        len(record.chunk_times_s),
    ]


def record_lines(result: Result) -> list[str]:
    """Every request in full, one JSON object a line: arrivals of its chunks in seconds after it was due."""
    return [
        json.dumps(
            {
                **{one.name: getattr(record, one.name) for one in fields(record) if one.name not in _RAW},
                "offered_rps": point.offered_rps,
                "repetition": repetition,
                "due_s": round(record.due_s - run.records[0].due_s, 6),
                "lag_s": round(record.sent_s - record.due_s, 6),
                "chunks_after_s": [round(time_s - record.due_s, 6) for time_s in record.chunk_times_s],
                "ended_after_s": round(record.end_to_end_s, 6),
            },
            ensure_ascii=False,
        )
        for point in result.points
        for repetition, run in enumerate(point.runs)
        for record in run.records
    ]


_RAW = ("sent_s", "ended_s", "chunk_times_s", "finished_s", "intended_s", "text")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def lines(scenario: Scenario, result: Result) -> list[str]:
    """The result for people."""
    text = [line for point in result.points for line in _point_lines(point, scenario)]
    if (found := highest_rate(scenario, result.points)) is not None:
        text.append(highest_rate_text(found))
    if result.quality is not None:
        text += quality_lines(result.quality)
    if result.interrupted:
        text.append("interrupted: these are the requests up to then")
    return text


def highest_rate_text(found: dict[str, float | None]) -> str:
    """The bracket of the search in a sentence."""
    meets, misses = _rate(found["meets_slo_rps"]), _rate(found["misses_slo_rps"])
    return f"highest rate that meets the SLOs: {meets}; lowest that misses them: {misses}"


def _rate(rate_rps: float | None) -> str:
    return "none measured" if rate_rps is None else f"{rate_rps:.3g} requests/s"


def _point_lines(point: Point, scenario: Scenario) -> list[str]:
    summary = point.summary
    counts = ", ".join(f"{count} {name}" for name, count in summary.outcomes.items())
    offered = f"offered {point.offered_rps:.3g} requests/s: " if point.offered_rps else ""
    return [
        f"{offered}{summary.requests} requests in {summary.duration_s:.1f} s: {counts}",
        *(f"  {count} × {detail}" for detail, count in list(summary.details.items())[:5]),
        *([f"  {summary.not_sent} planned requests were not sent"] if summary.not_sent else []),
        *(f"  {count} × {text}" for text, count in list(summary.contradictions.items())[:5]),
        *_rates(summary, scenario),
        _row("time to first token", summary.ttft_s),
        _row("inter-token latency", summary.inter_token_latency_s),
        _row("time per output token", summary.time_per_output_token_s),
        _row("end to end", summary.end_to_end_s),
        *_checks(point),
    ]


def _rates(summary: Summary, scenario: Scenario) -> list[str]:
    if summary.requests_per_s is None:
        return ["no steady interval: send more requests for each stream"]
    rates = [f"{summary.requests_per_s:.2f} requests/s over a window of {summary.steady_interval_s:.1f} s"]
    if summary.output_tokens_per_s is not None:
        rates.append(f"{summary.output_tokens_per_s:.1f} output tokens/s by the server's count")
    else:
        rates.append(f"output tokens/s unknown: {summary.completed_without_usage} answers came without usage")
    if summary.slo_attainment is not None:
        met = f"{summary.slo_attainment:.1%} of the requests met the SLOs (wanted: {scenario.slo.attainment:.0%})"
        rates.append(f"goodput {summary.goodput_rps or 0.0:.2f} requests/s; {met}")
    return rates


def _row(name: str, values: Distribution | None) -> str:
    if values is None:
        return f"{name:<22} not measured"
    names = {"mean": "mean", "p50": "p50", "p90": "p90", "p95": "p95", "p99": "p99", "p999": "p99.9"}
    cells = []
    for field, label in names.items():
        bounds = values.interval.get(field)
        spread = f" [{1000 * bounds.low:.1f}–{1000 * bounds.high:.1f}]" if bounds else ""
        cells.append(f"{label} {1000 * getattr(values, field):.1f}{spread}")
    return f"{name:<22} " + "  ".join(cells) + " ms"


def _checks(point: Point) -> list[str]:
    lag = point.summary.lag_s
    parts = {"sends": lag.send_p99, "event loop": lag.loop_p99}
    text = ", ".join(f"{name} {1000 * lag_s:.1f} ms" for name, lag_s in parts.items() if lag_s is not None)
    checks = [f"generator's lag, p99: {text}"]
    checks += [f"INVALID: {reason}" for reason in point.invalid_because]
    for check in point.usage:
        if check.agrees is False:
            checks.append(
                f"usage does not agree with the server's counter: {check.usage_tokens} against "
                f"{check.counter_tokens} output tokens (another client of the server, or wrong usage)"
            )
    return checks
