"""The frontier for people: a Markdown table, and one HTML page that needs no other file. It computes nothing."""

from collections.abc import Callable
from html import escape
from typing import Any

from lowbit_core.evals.arithmetic import Estimate, span
from lowbit_loadtest.frontier.charts import Spot, color, dots_by_group, legend, scatter, stacked_bars
from lowbit_loadtest.report.svg import Chart, Mark, Series

Document = dict[str, Any]
MIB = 1 << 20
COMPONENT_COLORS = ("#1864ab", "#74c0fc", "#f08c00", "#868e96", "#2b8a3e", "#862e9c")
STYLE = """
:root { color-scheme: light }
body { font: 16px/1.55 system-ui, "DejaVu Sans", sans-serif; max-width: 1080px; margin: 2.5rem auto; padding: 0 1.25rem;
  color: #212529; background: #fff }
h1 { font-size: 1.7rem; margin: 0 0 .2rem } h2 { font-size: 1.15rem; margin: 2.4rem 0 .3rem }
p { margin: .3rem 0 } .quiet { color: #5c636a; font-size: .9rem }
.verdict { border-left: 5px solid #2b8a3e; background: #f4faf5; padding: .8rem 1.1rem; margin: 1.2rem 0 }
.verdict.undecided { border-color: #e67700; background: #fff9ef }
.verdict.none { border-color: #c92a2a; background: #fdf3f3 }
.verdict strong { font-size: 1.1rem } .verdict ul { margin: .4rem 0 0; padding-left: 1.2rem; font-size: .92rem }
table { border-collapse: collapse; font-size: .84rem; width: 100% } .wide { overflow-x: auto }
th { text-align: right; color: #5c636a; font-weight: 500; vertical-align: bottom }
td, th { padding: 5px 6px; border-bottom: 1px solid #e9ecef; text-align: right } td { white-space: nowrap }
td:first-child, th:first-child { text-align: left } td small { color: #5c636a; display: block }
tr.best td { background: #f4faf5 }
svg { width: 100%; max-width: 900px; height: auto }
svg text { font: 13px system-ui, "DejaVu Sans", sans-serif; fill: #495057 }
svg text.name { paint-order: stroke; stroke: #fff; stroke-width: 4px; stroke-linejoin: round }
svg text.axis { fill: #212529 } svg text.name { fill: #212529; font-size: 13.5px }
figure { margin: .3rem 0; max-width: 900px } figure svg text { font-size: 11px } figcaption { display: none }
.legend { font-size: .88rem } .key { margin-right: 1.1rem; white-space: nowrap }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .4em }
.bad { background: #fff3bf; padding: 8px 12px }
"""


def as_markdown(document: Document) -> str:
    """A table, the recommendation above it."""
    head = _columns(document)
    lines = [
        f"# {document['plan']['description'] or 'Frontier'}",
        "",
        f"**{_verdict(document)}**",
        "",
        *(f"- {reason}" for reason in document["recommendation"]["reasons"]),
        *(f"- {name} could not be served: {reason}" for name, reason in document["failures"].items()),
        "",
        "| " + " | ".join(name for name, _ in head) + " |",
        "|" + "---|" * len(head),
    ]
    lines += ["| " + " | ".join(cell(one) for _, cell in head) + " |" for one in document["results"]]
    return "\n".join([*lines, "", _method(document), ""])


def as_html(document: Document) -> str:
    """The page."""
    plan, recommendation = document["plan"], document["recommendation"]
    title = plan["description"] or "Frontier"
    colors = {one["name"]: color(index) for index, one in enumerate(plan["checkpoints"])}
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in recommendation["reasons"])
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(_method(document))}</p>',
        f'<div class="verdict {recommendation["verdict"]}"><strong>{escape(_verdict(document))}</strong>'
        f"<ul>{reasons}</ul></div>",
        *(
            f'<p class="bad">{escape(name)} could not be served: {escape(reason)}</p>'
            for name, reason in document["failures"].items()
        ),
        *_pareto(document, colors),
        f'<h2>All numbers</h2><div class="wide">{_table(document)}</div>',
        *_latency(document, colors),
        *_domains(document, colors),
        *_memory(document),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html>\n<html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _verdict(document: Document) -> str:
    return str(document["recommendation"]["title"])


def _method(document: Document) -> str:
    quality = document["plan"]["quality"]
    if decision := document["decision"]:
        return (
            f"Measured in {decision['spent_s'] / 60:.1f} of {decision['within_s'] / 60:g} minutes, in rounds where the "
            f"decision hung; brackets and bars are confidence sequences, which hold however often one looks: "
            f"{decision['confidence']:.0%} for a checkpoint's own numbers, and for all of the result together."
        )
    done, planned = len(document["runs"]), document["planned_runs"]
    runs = f"{done} runs" if done == planned else f"{done} of {planned} runs (unfinished)"
    return (
        f"{runs}, interleaved; quality is judged under load, against {document['plan']['base']} on the same items "
        f"({quality['limit']} of each task). Brackets and bars are 95 % intervals."
    )


Column = tuple[str, Callable[[Document], str]]


def _columns(document: Document) -> list[Column]:
    def estimate(key: str, form: str) -> Callable[[Document], str]:
        return lambda one: span(Estimate(**one[key]), form) if one[key] else "–"

    def speed(name: str) -> Callable[[Document], str]:
        return lambda one: span(Estimate(**one["throughput"][name]), "{:.0f}") if one["runs"] else "–"

    return [
        ("checkpoint", lambda one: str(one["name"])),
        *((f"{load['name']}, tokens/s", speed(load["name"])) for load in document["plan"]["scenarios"]),
        ("acc_norm", estimate("acc_norm", "{:.1%}")),
        ("of base", estimate("acc_norm_of_base", "{:.3f}")),
        ("perplexity", estimate("perplexity", "{:.2f}")),
        ("of base", estimate("perplexity_of_base", "{:.3f}")),
        ("KL ≥, nats", _kl),
        ("flips", _flips),
        ("under load", lambda one: one["quality_under_load"] or "–"),
        ("weights, MiB", lambda one: f"{one['memory_bytes'].get('weights', 0) / MIB:.0f}"),
        ("KV tokens", lambda one: f"{one['kv_tokens']:,}" if one["kv_tokens"] else "–"),
    ]


def _kl(one: Document) -> str:
    against = one["against_base"]
    return (
        span(Estimate(**against["kl_lower_bound"]), "{:.3f}")
        if against and against["kl_lower_bound"]
        else "–"
    )


def _flips(one: Document) -> str:
    against = one["against_base"]
    return f"{against['flips']} of {against['items']}" if against else "–"


def _table(document: Document) -> str:
    columns = _columns(document)
    head = "".join(f"<th>{escape(name)}</th>" for name, _ in columns)
    best = document["recommendation"]["name"]
    rows = "".join(
        f"<tr{' class=best' if one['name'] == best else ''}>"
        + "".join(f"<td>{_cell(cell(one))}</td>" for _, cell in columns)
        + "</tr>"
        for one in document["results"]
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


def _cell(text: str) -> str:
    value, bracket, interval = escape(text).partition(" [")
    return f"{value}<small>{bracket.strip()}{interval}</small>" if bracket else value


def _pareto(document: Document, colors: dict[str, str]) -> list[str]:
    parts = []
    known = [one for one in document["results"] if one["acc_norm"] and one["runs"]]
    for load in document["plan"]["scenarios"] if known else ():
        name = load["name"]
        spots = [
            Spot(
                one["name"],
                colors[one["name"]],
                Estimate(**one["throughput"][name]),
                Estimate(**one["acc_norm"]),
            )
            for one in known
        ]
        picture = scatter(
            spots, document["pareto"][name], "output tokens/s within the limits", "acc_norm", percent=True
        )
        parts.append(
            f"<h2>Throughput against acc_norm: {escape(name)}</h2>"
            f'<p class="quiet">Up and to the right is better; filled points are on the Pareto frontier.</p>{picture}'
        )
    return parts


def _latency(document: Document, colors: dict[str, str]) -> list[str]:
    series = [
        Series(
            name,
            [
                Mark(one["offered_rps"], 1000 * one["ttft_p95_s"]["value"], *_milliseconds(one["ttft_p95_s"]))
                for one in rows
            ],
            color=colors[name],
        )
        for name, rows in document["latency"].items()
        if rows
    ]
    if not series:
        return []
    limit = document["plan"]["constraints"]["ttft_p95_s"]
    chart = Chart(
        "latency against rate",
        "offered requests/s",
        "p95 time to first token, ms",
        series,
        {"limit": 1000 * limit} if limit else {},
    )
    name = document["plan"]["scenarios"][0]["name"]
    return [
        f"<h2>Latency against rate: {escape(name)}</h2>{legend({one.name: colors[one.name] for one in series})}",
        chart.svg(),
    ]


def _milliseconds(one: Document) -> tuple[float | None, float | None]:
    return tuple(None if one[end] is None else 1000 * one[end] for end in ("low", "high"))  # type: ignore[return-value]


def _domains(document: Document, colors: dict[str, str]) -> list[str]:
    """acc_norm by task, and perplexity of held-out text by domain; both under load."""
    found: dict[str, dict[str, list[tuple[str, str, Estimate]]]] = {"acc_norm": {}, "perplexity": {}}
    for run in document["runs"]:
        for result in run["scenarios"].values():
            for task, both in (result.get("quality") or {}).get("tasks", {}).items():
                for kind, groups in found.items():
                    is_shown = kind == "acc_norm" or task.startswith("text:")
                    if task != "all" and is_shown and both["loaded"] and both["loaded"][kind]:
                        name = run["checkpoint"]
                        one = (name, colors[name], Estimate(**both["loaded"][kind]))
                        groups.setdefault(task.removeprefix("text:"), []).append(one)
    parts = ["<h2>Quality by domain</h2>" + legend(colors)] if any(found.values()) else []
    if found["acc_norm"]:
        parts.append(dots_by_group(_in_order(found["acc_norm"], colors), "acc_norm under load", percent=True))
    if found["perplexity"]:
        parts.append(
            dots_by_group(_in_order(found["perplexity"], colors), "perplexity of held-out text, under load")
        )
    return parts


def _in_order(
    groups: dict[str, list[tuple[str, str, Estimate]]], colors: dict[str, str]
) -> dict[str, list[tuple[str, str, Estimate]]]:
    order = list(colors)
    return {
        group: sorted(members, key=lambda one: order.index(one[0]))
        for group, members in sorted(groups.items())
    }


def _memory(document: Document) -> list[str]:
    results = [one for one in document["results"] if one["memory_bytes"]]
    if not results:
        return []
    components = list(dict.fromkeys(component for one in results for component in one["memory_bytes"]))
    colors = dict(zip(components, COMPONENT_COLORS, strict=False))
    rows = [
        (
            one["name"],
            {component: size / MIB for component, size in one["memory_bytes"].items()},
            f"{one['kv_tokens']:,} tokens of KV" if one["kv_tokens"] else "",
        )
        for one in results
    ]
    return [f"<h2>Memory by component</h2>{legend(colors)}", stacked_bars(rows, colors, "MiB")]
