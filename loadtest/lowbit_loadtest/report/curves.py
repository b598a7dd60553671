"""The charts of a ramp, a search or a sweep: everything that was measured along the key that varies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowbit_core.pages.chart import Chart, Mark, Series, lines

LATENCIES = {
    "ttft_s": "time to first token",
    "time_to_first_answer_s": "time to first answer",
    "inter_token_latency_s": "inter-token latency",
    "time_per_output_token_s": "time per output token",
    "end_to_end_s": "end to end",
}
LIMIT_OF = {"ttft_s": "ttft_s", "time_per_output_token_s": "tpot_s", "end_to_end_s": "e2e_s"}
PRICE = "price of a million output tokens"

Document = dict[str, Any]


def latencies_of(points: Sequence[Document]) -> list[str]:
    """Those that were measured; the first answer only where it is not the first token."""
    thought = any(point.get("time_to_first_answer_s") != point["ttft_s"] for point in points)
    return [name for name in LATENCIES if name != "time_to_first_answer_s" or thought]


def curve_charts(points: list[Document], slo: Document) -> list[Chart]:
    """Latencies, rates and costs along each curve; nothing of a single load."""
    return [chart for curve in _curves(points) for chart in _along(curve, slo)] if len(points) > 1 else []


@dataclass(frozen=True)
class Curve:
    """Points that differ in one key, in its order; `others` names what is fixed."""

    along: str
    others: str
    points: list[Document]

    def x(self, point: Document) -> float:
        return float(point["setting"].get(self.along) or point["offered_rps"] or 0.0)

    @property
    def x_name(self) -> str:
        return "offered requests/s" if self.along == "rate_rps" else self.along.replace("_", " ")


def _curves(points: list[Document]) -> list[Curve]:
    """The curves of a ramp, a search or a sweep: along its first key that varies, one for each value of the others."""
    settings = [point["setting"] or {"rate_rps": point["offered_rps"] or 0.0} for point in points]
    keys = list(dict.fromkeys(key for setting in settings for key in setting))
    varied = [key for key in keys if len({setting.get(key) for setting in settings}) > 1]
    along = varied[0] if varied else "rate_rps"
    found: dict[str, list[Document]] = {}
    for point, setting in zip(points, settings, strict=True):
        others = [f"{key.replace('_', ' ')} {setting[key]:g}" for key in varied[1:] if key in setting]
        found.setdefault(", ".join(others), []).append(point)
    ordered = [Curve(along, others, members) for others, members in found.items() if len(members) > 1]
    return [Curve(one.along, one.others, sorted(one.points, key=one.x)) for one in ordered]


def _along(curve: Curve, slo: Document) -> list[Chart]:
    latencies = [_against(curve, name, slo) for name in latencies_of(curve.points)]
    charts = [*latencies, _throughput(curve), _tokens(curve), *_costs(curve)]
    return [chart for chart in charts if chart.table.rows]


def _titled(title: str, curve: Curve) -> str:
    against = "rate" if curve.along == "rate_rps" else curve.x_name
    return f"{title} against {against}" + (f" ({curve.others})" if curve.others else "")


def _against(curve: Curve, name: str, slo: Document) -> Chart:
    series = [
        Series(
            which, [latency_mark(curve.x(point), point[name], which) for point in curve.points if point[name]]
        )
        for which in ("p50", "p95", "p99")
    ]
    limit = slo.get(LIMIT_OF.get(name, ""))
    limits = {} if limit is None else {"SLO": 1000 * limit}
    return lines(_titled(LATENCIES[name], curve), curve.x_name, "ms", series, limits)


def _throughput(curve: Curve) -> Chart:
    names = {"completed": "requests_per_s", "goodput": "goodput_rps"}
    return lines(_titled("requests", curve), curve.x_name, "requests/s", _rates(curve, names))


def _tokens(curve: Curve) -> Chart:
    names = {"output tokens": "output_tokens_per_s", "prompt and output": "total_tokens_per_s"}
    return lines(_titled("tokens", curve), curve.x_name, "tokens/s", _rates(curve, names))


def _rates(curve: Curve, names: dict[str, str]) -> list[Series]:
    return [
        Series(title, [_rate_mark(curve.x(one), one, name) for one in curve.points if one[name] is not None])
        for title, name in names.items()
    ]


def _rate_mark(x: float, point: Document, name: str) -> Mark:
    bounds = (point.get("rate_intervals") or {}).get(name) or {}
    return Mark(x, point[name], bounds.get("low"), bounds.get("high"))


def _costs(curve: Curve) -> list[Chart]:
    """Joules and money, where they are known."""
    names = {"joules_per_output_token": "joules per output token", "price_per_million_output_tokens": PRICE}
    charts = []
    for key, title in names.items():
        marks = [
            Mark(curve.x(point), cost[key], **(cost["intervals"].get(key) or {}))
            for point in curve.points
            if (cost := point.get("cost")) and cost[key] is not None
        ]
        if marks:
            charts.append(lines(_titled(title, curve), curve.x_name, title, [Series(title, marks)]))
    return charts


def latency_mark(x: float | str, values: Document, which: str) -> Mark:
    bounds = values["interval"].get(which)
    ends = (1000 * bounds["low"], 1000 * bounds["high"]) if bounds else (None, None)
    return Mark(x, 1000 * values[which], *ends)
