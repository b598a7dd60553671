"""The result for programs: one JSON object, and one line for each request. It computes nothing."""

import json
import os
import platform
from dataclasses import asdict, fields
from typing import Any

import httpx

from lowbit_core import __version__
from lowbit_core.cpu_speeds import processor
from lowbit_core.evals.results import as_rows
from lowbit_loadtest.generate.records import RequestRecord
from lowbit_loadtest.quality.verdict import QualityResult
from lowbit_loadtest.report.cost import point_cost
from lowbit_loadtest.report.result import Joined, Point, Result, highest_rate
from lowbit_loadtest.report.summary import Run
from lowbit_loadtest.scenario import Scenario

FORMAT_VERSION = 3
REQUEST_COLUMNS = (
    "repetition", "index", "turn", "warm_up", "outcome", "due_s", "lag_s", "ttft_s", "ttfa_s", "tpot_s", "e2e_s",
    "prompt_tokens", "output_tokens", "chunks",
)  # fmt: skip


def as_document(
    scenario: Scenario,
    result: Result,
    started: str,
    requests: bool = False,
    price_per_hour: float | None = None,
) -> dict[str, Any]:
    """The result: what was asked, by what client, and what was measured, at each rate.

    The first point's numbers also stand at the top: most runs have one. With `requests`, each point has a table of
    its requests, which `lowbit compare` pairs.
    """
    points = [_point(point, scenario, requests, price_per_hour) for point in result.points]
    first = asdict(result.points[0].summary) if len(points) == 1 else {}
    return {
        "kind": "lowbit.loadtest",
        "format_version": FORMAT_VERSION,
        "started": started,
        "target": result.target.shown,
        "request": dict(result.joined.request) if result.joined else result.target.described(),
        "model": result.target.model,
        "scenario": scenario.model_dump(mode="json"),
        "client": {
            "lowbit": __version__,
            "python": platform.python_version(),
            "httpx": httpx.__version__,
            "processor": processor(),
            "cpus": os.cpu_count(),
            "workers": result.workers,
            "prompt_tokens_counted_by": result.counted_by,
        },
        "interrupted": result.interrupted,
        "valid": all(point.valid for point in result.points),
        "invalid_because": [reason for point in result.points for reason in point.invalid_because],
        "highest_rate": highest_rate(scenario, result.points),
        "knees": [asdict(knee) for knee in result.knees],
        "joined": _joined(result.joined) if result.joined else None,
        "recording": asdict(result.recording) if result.recording else None,
        "quality": quality_document(result.quality, requests) if result.quality else None,
        **first,
        "points": points,
    }


def _joined(joined: Joined) -> dict[str, Any]:
    return {"parts": joined.parts, "starts_apart_s": joined.starts_apart_s}


def _point(point: Point, scenario: Scenario, requests: bool, price_per_hour: float | None) -> dict[str, Any]:
    return {
        "setting": dict(point.setting),
        "offered_rps": point.offered_rps,
        "valid": point.valid,
        "invalid_because": list(point.invalid_because),
        "meets_slo": point.meets(scenario) if scenario.slo.has_limits else None,
        **asdict(point.summary),
        "cost": asdict(point_cost(point, price_per_hour)),
        "sessions": asdict(point.sessions) if point.sessions else None,
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
        _rounded(record.time_to_first_answer_s),
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


def quality_document(quality: QualityResult, answers: bool) -> dict[str, Any]:
    """The section `quality`; with `answers`, every answer too, for `--quality-base` of a later run."""
    tasks = {
        task: {"idle": asdict(idle), "loaded": asdict(loaded) if loaded else None}
        for task, (idle, loaded) in quality.tasks.items()
    }
    responses = {"idle": quality.idle.answers, "loaded": quality.loaded.answers}
    return {
        "right_answers": asdict(quality.right_answers) if quality.right_answers else None,
        "tasks": tasks,
        "under_load": asdict(quality.under_load),
        "against_base": asdict(quality.against_base) if quality.against_base else None,
        "probe_failures": asdict(quality.probe_failures),
        "under_load_share": quality.under_load_share,
        "load": quality.load,
        "unsupported": list(quality.unsupported),
        **({"answers": {name: as_rows(one) for name, one in responses.items()}} if answers else {}),
    }
