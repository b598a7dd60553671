"""The result as one page: a table of rates, latency against rate, percentiles, every request. It computes nothing."""

from collections import Counter
from typing import Any

from lowbit_core.evals.arithmetic import Estimate, span
from lowbit_core.pages.chart import Chart, Series, Table, lines
from lowbit_core.pages.html import heading, page, paragraph, verdict, wide
from lowbit_core.pages.plots import dots
from lowbit_loadtest.report.curves import LATENCIES, curve_charts, latencies_of, latency_mark
from lowbit_loadtest.report.knee import Knee
from lowbit_loadtest.report.statistics import PERCENTILES
from lowbit_loadtest.report.text import VERDICTS, highest_rate_text, knee_text, points_text

MOST_DOTS = 4000
SLICES = 10  # of a run, in the table beside its requests
QUALITY_KINDS = {"pass": "good", "undecided": "open", "fail": "bad"}

Document = dict[str, Any]


def as_html(document: Document) -> str:
    """A whole page from `report.as_document(…, requests=True)`."""
    title = f"Load test of {document['model']}"
    scenario = document["scenario"]
    about = (
        f"{document['started']}, {document['target']}, seed {scenario['seed']}, {document['client']['workers']} "
        f"workers on {document['client']['cpus']} CPUs. Latencies are of completed requests. Brackets and bars are "
        "95 % intervals."
    )
    parts: list[str | Chart] = [
        heading(title),
        *([paragraph(scenario["description"])] if scenario["description"] else []),
        paragraph(about, "quiet"),
        *(paragraph(f"Invalid: {reason}", "warning") for reason in document["invalid_because"]),
        *(
            [paragraph("Interrupted: these are the requests up to then.", "warning")]
            * document["interrupted"]
        ),
        *([verdict("good", highest_rate_text(found))] if (found := document["highest_rate"]) else []),
        *([paragraph(text) for text in _knees(document)]),
        "<h2>Loads</h2>",
        wide(_table(document["points"])),
        *_sessions(document["points"]),
        *(_quality(found) if (found := document["quality"]) else []),
        "<h2>Charts</h2>",
        *_charts(document),
    ]
    return page(title, parts)


def _table(points: list[Document]) -> Table:
    """A row for each rate; columns that no rate has a number for are left out."""
    rows = [_row(point) for point in points]
    shown = [name for name in rows[0] if any(row[name] != "–" for row in rows)] if rows else []
    return Table(shown, [[row[name] for name in shown] for row in rows])


def _row(point: Document) -> dict[str, str]:
    ttft, cost = point["ttft_s"] or {}, point.get("cost") or {}
    lags = [point["lag_s"][name] for name in ("send_p99", "loop_p99") if point["lag_s"][name] is not None]
    return {
        "load": load_name(point),
        "requests": str(point["requests"]),
        **{name.replace("_", " "): str(count) for name, count in point["outcomes"].items()},
        "completed/s": _number(point["requests_per_s"]),
        "output tokens/s": _number(point["output_tokens_per_s"]),
        "goodput/s": _number(point["goodput_rps"]),
        "in SLO": _number(point["slo_attainment"], 100, " %"),
        "TTFT p50 ms": _number(ttft.get("p50"), 1000),
        "TTFT p99 ms": _number(ttft.get("p99"), 1000),
        "J/output token": _number(cost.get("joules_per_output_token")),
        "price/M output tokens": _number(cost.get("price_per_million_output_tokens")),
        "price/M tokens": _number(cost.get("price_per_million_tokens")),
        "lag p99 ms": _number(max(lags, default=None), 1000),
    }


def load_name(point: Document) -> str:
    """What was offered, in a word or two."""
    others = {name: value for name, value in point["setting"].items() if name != "rate_rps"}
    rate = [f"{point['offered_rps']:.3g}/s"] if point["offered_rps"] else []
    parts = rate + [f"{name.replace('_', ' ')} {value:g}" for name, value in others.items()]
    return ", ".join(parts) or "closed loop"


def _knees(document: Document) -> list[str]:
    """Each knee of a sweep in a sentence."""
    return [knee_text(Knee(**knee)) for knee in document.get("knees") or []]


def _sessions(points: list[Document]) -> list[str]:
    """A row for each load that had sessions."""
    rows = []
    for point in points:
        if one := point.get("sessions"):
            finish = one["time_to_finish_s"] or {}
            cells = [
                str(one["sessions"]),
                str(one["finished"]),
                _number(finish.get("p50")),
                _number(finish.get("p95")),
                _number(one["cached_prefix_share"], 100, " %"),
                _number(one["attainment"], 100, " %"),
                _number(one["goodput_per_s"]),
            ]
            rows.append([load_name(point), *cells])
    names = ["finished", "finish p50 s", "finish p95 s", "prefix in cache", "within deadline", "goodput/s"]
    return ["<h2>Sessions</h2>", wide(Table(["load", "sessions", *names], rows))] if rows else []


def _quality(quality: Document) -> list[str]:
    """Each task idle and under load, below the one number."""
    rows = [
        [task, str(both["idle"]["items"]), _task(both["idle"]), _task(both["loaded"])]
        for task, both in quality["tasks"].items()
    ]
    parts = ["<h2>Quality under load</h2>", *(paragraph(one, "warning") for one in quality["unsupported"])]
    if found := quality["right_answers"]:
        points = points_text(Estimate(**found["change"]))
        text = f"{VERDICTS[found['verdict']]}; right answers {points} of {found['judged']}"
        parts.append(verdict(QUALITY_KINDS[found["verdict"]], text))
    return [*parts, wide(Table(["task", "items", "idle", "under load"], rows))]


def _task(result: Document | None) -> str:
    if result is None:
        return "–"
    acc_norm, perplexity = result["acc_norm"], result["perplexity"]
    parts = [span(Estimate(**acc_norm), "{:.1%}")] if acc_norm else []
    parts += [f"perplexity {span(Estimate(**perplexity), '{:.2f}')}"] if perplexity else []
    return ", ".join(parts) or "–"


def _number(value: float | None, factor: float = 1.0, unit: str = "") -> str:
    return "–" if value is None else f"{value * factor:.4g}{unit}"


def _charts(document: Document) -> list[Chart]:
    points, slo = document["points"], document["scenario"]["slo"]
    charts = curve_charts(points, slo)
    charts += [_percentiles(points, name) for name in latencies_of(points)]
    charts += [_in_time(points[-1])] if points else []
    return charts


def _percentiles(points: list[Document], name: str) -> Chart:
    """At most five rates: more lines cannot be told apart."""
    chosen = [point for point in points if point[name]][:5]
    series = [
        Series(
            load_name(point),
            [latency_mark(f"p{percent:g}", point[name], which) for which, percent in PERCENTILES.items()],
        )
        for point in chosen
    ]
    return lines(f"{LATENCIES[name]}: percentiles", "percentile", "ms", series)


def _in_time(point: Document) -> Chart:
    """Time to first token of each request against when it was due; stalls and queues show as slopes."""
    columns = point["request_table"]["columns"]
    rows = [dict(zip(columns, row, strict=True)) for row in point["request_table"]["rows"]]
    completed = [row for row in rows if row["outcome"] == "completed" and row["ttft_s"] is not None]
    others = [row for row in rows if row["outcome"] != "completed"]
    step = -(-len(rows) // MOST_DOTS) or 1
    return dots(
        f"each request of {load_name(point)}: time to first token"
        + (f" (every {step}th)" if step > 1 else ""),
        "s since the start",
        "ms",
        [(row["due_s"], round(1000 * row["ttft_s"], 3)) for row in completed[::step]],
        [(row["due_s"], row["outcome"].replace("_", " ")) for row in others[::step]],
        _slices(rows),
        "a cross on the floor is a request that did not complete" if others else "",
    )


def _slices(rows: list[Document]) -> Table:
    """The run in ten pieces: requests, how many completed, their median and longest time to first token."""
    end_s = max((row["due_s"] for row in rows), default=0.0)
    pieces: dict[int, list[Document]] = {}
    for row in rows:
        pieces.setdefault(min(SLICES - 1, int(SLICES * row["due_s"] / end_s)) if end_s else 0, []).append(row)
    cells = []
    for piece, found in sorted(pieces.items()):
        outcomes = Counter(row["outcome"] for row in found)
        times_ms = sorted(
            1000 * row["ttft_s"]
            for row in found
            if row["outcome"] == "completed" and row["ttft_s"] is not None
        )
        middle, most = (times_ms[len(times_ms) // 2], times_ms[-1]) if times_ms else (None, None)
        span_s = f"{piece * end_s / SLICES:.3g}–{(piece + 1) * end_s / SLICES:.3g}"
        cells.append([span_s, str(len(found)), str(outcomes["completed"]), _number(middle), _number(most)])
    return Table(["s", "requests", "completed", "TTFT p50 ms", "longest ms"], cells)
