"""From what was sent to the numbers of a point: one machine's records, or those of several parts joined.

Each part's times count from its own start. Parts that started more than a second apart did not send one load, and the
point says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowbit_loadtest.generate.records import Interval, RequestRecord
from lowbit_loadtest.report.result import Point, Setting
from lowbit_loadtest.report.server_metrics import Values, check_usage, summarize_samples
from lowbit_loadtest.report.sessions import sessions_of
from lowbit_loadtest.report.summary import (
    Run,
    Summary,
    arrival_window,
    steady_interval,
    summarize,
    whole_span,
)
from lowbit_loadtest.scenario import Scenario
from lowbit_loadtest.sections.arrivals import AtOnce

MOST_APART_S = 1.0  # between the starts of parts


@dataclass(frozen=True)
class Sent:
    """What one machine sent of one repetition. Times of records count from `start_s`, which was `started_unix_s`.

    `planned` is its number of requests, None where the time decides; `concurrency` its streams of a closed loop.
    """

    records: tuple[RequestRecord, ...]
    start_s: float
    started_unix_s: float
    plan: str  # the digest of the whole plan
    planned: int | None
    concurrency: int | None
    length_s: float | None
    heartbeat_lags_s: tuple[float, ...] = ()
    lost_workers: int = 0
    interrupted: bool = False
    samples: tuple[Values, ...] = ()  # of the server's own metrics meanwhile
    sample_times_s: tuple[float, ...] = ()


@dataclass(frozen=True)
class Measured:
    """One point as it was sent: each repetition by one machine, or by all parts."""

    setting: Setting
    offered_rps: float | None
    repetitions: tuple[tuple[Sent, ...], ...]


def make_point(scenario: Scenario, measured: Measured) -> Point:
    """The numbers of one point; `scenario` is that of its setting."""
    runs = tuple(make_run(scenario, parts) for parts in measured.repetitions)
    summary = summarize(runs, scenario.slo)
    reasons = [reason for parts in measured.repetitions for reason in _troubles(parts)]
    reasons += _too_late(summary, scenario.generator.max_lag_s)
    servers = [_server(parts) for parts in measured.repetitions]
    usage = [check_usage(server, run.records) for server, run in zip(servers, runs, strict=True)]
    has_sessions = any(record.turns > 1 for run in runs for record in run.records)
    return Point(
        measured.offered_rps,
        runs,
        summary,
        not reasons,
        tuple(reasons),
        tuple(server for server in servers if server is not None),
        tuple(check for check in usage if check is not None),
        measured.setting,
        sessions_of(runs, scenario.slo) if has_sessions or scenario.slo.session_s else None,
    )


def make_run(scenario: Scenario, parts: Sequence[Sent]) -> Run:
    """The records of all parts on one clock, with the window that rates are computed over."""
    records = tuple(sorted((one for part in parts for one in part.records), key=lambda one: one.due_s))
    not_sent = sum(part.planned - len(part.records) for part in parts if part.planned is not None)
    closed = parts[0].concurrency is not None and all(record.turns == 1 for record in records)
    if isinstance(scenario.arrivals, AtOnce):
        window, closed = whole_span(records), False
    elif closed:
        window = _overlap([steady_interval(part.records, part.concurrency or 1) for part in parts])
    else:
        ends_s = parts[0].start_s + parts[0].length_s if parts[0].length_s else None
        window = arrival_window(records, ends_s)
    beats = tuple(lag_s for part in parts for lag_s in part.heartbeat_lags_s)
    return Run(records, window, closed, not_sent, beats)


def _overlap(intervals: Sequence[Interval | None]) -> Interval | None:
    """While every part was steady."""
    known = [one for one in intervals if one is not None]
    if len(known) < len(intervals):
        return None
    start_s, end_s = max(one.start_s for one in known), min(one.end_s for one in known)
    return Interval(start_s, end_s) if end_s > start_s else None


def _server(parts: Sequence[Sent]) -> dict[str, Any] | None:
    """The server's metrics from the first sample of any part to the last: each part looks at the whole server."""
    seen = sorted(
        (
            (at_s - part.start_s, values)
            for part in parts
            for at_s, values in zip(part.sample_times_s, part.samples, strict=True)
        ),
        key=lambda one: one[0],
    )
    return summarize_samples([values for _, values in seen], [at_s for at_s, _ in seen])


def _troubles(parts: Sequence[Sent]) -> list[str]:
    reasons = [f"{part.lost_workers} worker processes died" for part in parts if part.lost_workers]
    if (apart_s := starts_apart_s(parts)) > MOST_APART_S:
        reasons.append(f"the parts started {apart_s:.1f} s apart: give all of them one --start-at")
    return reasons


def starts_apart_s(parts: Sequence[Sent]) -> float:
    """Between the first part's start and the last one's, by their machines' clocks."""
    starts_s = [part.started_unix_s for part in parts]
    return max(starts_s) - min(starts_s)


def _too_late(summary: Summary, max_lag_s: float) -> list[str]:
    lags = {"sends were late": summary.lag_s.send_p99, "the event loops were late": summary.lag_s.loop_p99}
    return [
        f"{name}: p99 {1000 * lag_s:.1f} ms is above {1000 * max_lag_s:g} ms"
        for name, lag_s in lags.items()
        if lag_s is not None and lag_s > max_lag_s
    ]
