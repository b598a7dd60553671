"""The result as one HTML file, without scripts and other files: latency against rate, percentiles, every request."""

from html import escape
from typing import Any

from lowbit_core.evals.arithmetic import Estimate, span
from lowbit_loadtest.report.statistics import PERCENTILES
from lowbit_loadtest.report.svg import Chart, Mark, Series
from lowbit_loadtest.report.text import VERDICTS, highest_rate_text, points_text

LATENCIES = {
    "ttft_s": "time to first token",
    "inter_token_latency_s": "inter-token latency",
    "time_per_output_token_s": "time per output token",
    "end_to_end_s": "end to end",
}
LIMIT_OF = {"ttft_s": "ttft_s", "time_per_output_token_s": "tpot_s", "end_to_end_s": "e2e_s"}
MOST_DOTS = 4000
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; color: #212529 }
figure { display: inline-block; width: 480px; max-width: 100%; margin: 0 8px 16px 0; vertical-align: top }
svg { width: 100% } svg text { font: 12px system-ui, sans-serif; fill: #495057 }
table { border-collapse: collapse } td, th { padding: 2px 10px; text-align: right; border-bottom: 1px solid #dee2e6 }
.bad { background: #fff3bf; padding: 8px 12px }
"""

Document = dict[str, Any]


def as_html(document: Document) -> str:
    """A whole page from `report.as_document(…, requests=True)`."""
    title = f"Load test of {document['model']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(document['scenario']['description'])}</p>" * bool(document["scenario"]["description"]),
        f"<p>{escape(document['started'])}, {escape(document['target'])}, seed {document['scenario']['seed']}, "
        f"{document['client']['workers']} workers on {document['client']['cpus']} CPUs. Brackets and bars are "
        "95 % intervals.</p>",
        *(f'<p class="bad">Invalid: {escape(reason)}</p>' for reason in document["invalid_because"]),
        '<p class="bad">Interrupted: these are the requests up to then.</p>' * bool(document["interrupted"]),
        *([f"<p>{escape(highest_rate_text(found))}</p>"] if (found := document["highest_rate"]) else []),
        _table(document["points"]),
        *([_quality(found)] if (found := document["quality"]) else []),
        *(chart.svg() for chart in _charts(document)),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html>\n<html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _table(points: list[Document]) -> str:
    names = (
        "offered/s",
        "completed/s",
        "output tokens/s",
        "goodput/s",
        "in SLO",
        "requests",
        "not completed",
    )
    head = "".join(f"<th>{name}</th>" for name in (*names, "TTFT p50 ms", "TTFT p99 ms", "lag p99 ms"))
    return f"<table><tr>{head}</tr>{''.join(map(_table_row, points))}</table>"


def _table_row(point: Document) -> str:
    ttft = point["ttft_s"] or {}
    lags = [point["lag_s"][name] for name in ("send_p99", "loop_p99") if point["lag_s"][name] is not None]
    cells = (
        _number(point["offered_rps"]),
        _number(point["requests_per_s"]),
        _number(point["output_tokens_per_s"]),
        _number(point["goodput_rps"]),
        _number(point["slo_attainment"], 100, " %"),
        str(point["requests"]),
        str(point["requests"] - point["outcomes"]["completed"]),
        _number(ttft.get("p50"), 1000),
        _number(ttft.get("p99"), 1000),
        _number(max(lags, default=None), 1000),
    )
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _quality(quality: Document) -> str:
    """Each task idle and under load, below the one number."""
    head = "".join(f"<th>{name}</th>" for name in ("task", "items", "idle", "under load"))
    rows = "".join(
        f"<tr><td>{escape(task)}</td><td>{both['idle']['items']}</td><td>{_task(both['idle'])}</td>"
        f"<td>{_task(both['loaded'])}</td></tr>"
        for task, both in quality["tasks"].items()
    )
    change = ""
    if found := quality["right_answers"]:
        points = points_text(Estimate(**found["change"]))
        change = f"<p>{escape(VERDICTS[found['verdict']])}; right answers {escape(points)} of {found['judged']}</p>"
    reasons = "".join(f'<p class="bad">{escape(reason)}</p>' for reason in quality["unsupported"])
    return f"<h2>Quality</h2>{reasons}{change}<table><tr>{head}</tr>{rows}</table>"


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
    charts = []
    if len(points) > 1:
        charts += [_against_rate(points, name, slo) for name in LATENCIES]
        charts.append(_throughput(points))
    charts += [_percentiles(points, name) for name in LATENCIES]
    charts.append(_in_time(points[-1]))
    return charts


def _against_rate(points: list[Document], name: str, slo: Document) -> Chart:
    ordered = sorted(points, key=lambda point: point["offered_rps"] or 0.0)
    series = [
        Series(
            which,
            [_mark(point["offered_rps"] or 0.0, point[name], which) for point in ordered if point[name]],
        )
        for which in ("p50", "p95", "p99")
    ]
    limit = slo.get(LIMIT_OF.get(name, ""))
    limits = {} if limit is None else {"SLO": 1000 * limit}
    return Chart(f"{LATENCIES[name]} against rate", "offered requests/s", "ms", series, limits)


def _throughput(points: list[Document]) -> Chart:
    ordered = sorted(points, key=lambda point: point["offered_rps"] or 0.0)
    names = {"completed": "requests_per_s", "goodput": "goodput_rps"}
    series = [
        Series(
            title, [Mark(one["offered_rps"] or 0.0, one[name]) for one in ordered if one[name] is not None]
        )
        for title, name in names.items()
    ]
    return Chart("requests completed against offered", "offered requests/s", "requests/s", series)


def _percentiles(points: list[Document], name: str) -> Chart:
    """At most five rates: more lines cannot be told apart."""
    chosen = [point for point in points if point[name]][:5]
    series = [
        Series(
            f"{point['offered_rps']:.3g}/s" if point["offered_rps"] else "closed loop",
            [_mark(float(place), point[name], which) for place, which in enumerate(PERCENTILES)],
        )
        for point in chosen
    ]
    scale = ", ".join(f"{place} = p{percent:g}" for place, percent in enumerate(PERCENTILES.values()))
    return Chart(f"{LATENCIES[name]}: percentiles", scale, "ms", series)


def _mark(x: float, values: Document, which: str) -> Mark:
    bounds = values["interval"].get(which)
    ends = (1000 * bounds["low"], 1000 * bounds["high"]) if bounds else (None, None)
    return Mark(x, 1000 * values[which], *ends)


def _in_time(point: Document) -> Chart:
    """Time to first token of each request against when it was due; stalls and queues show as slopes."""
    table = point["request_table"]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    seen = [row for row in rows if row["ttft_s"] is not None]
    step = -(-len(seen) // MOST_DOTS) or 1
    dots = [Mark(row["due_s"], 1000 * row["ttft_s"]) for row in seen[::step]]
    note = f" (every {step}th)" if step > 1 else ""
    return Chart(
        f"time to first token of each request{note}", "s since the start", "ms", [Series("TTFT", dots, True)]
    )
