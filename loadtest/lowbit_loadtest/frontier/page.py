"""The frontier for people: a Markdown table, and one HTML page that needs no other file. It computes nothing."""

from collections.abc import Callable
from typing import Any

from lowbit_core.evals.arithmetic import Estimate, span
from lowbit_core.pages.chart import COLORS, Chart, Mark, Series, Table, lines
from lowbit_core.pages.html import heading, page, paragraph, verdict, wide
from lowbit_core.pages.plots import Bar, Member, Spot, intervals, scatter, stacked_bars
from lowbit_loadtest.frontier.charts import decision_charts

Document = dict[str, Any]
MIB = 1 << 20
VERDICT_KINDS = {"recommended": "good", "equal": "good", "undecided": "open", "none": "bad"}
COMPONENT_COLORS = ("#1864ab", "#74c0fc", "#f08c00", "#868e96", "#2b8a3e", "#862e9c")


def as_markdown(document: Document) -> str:
    """A table, the recommendation above it."""
    head = _columns(document)
    text = [
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
    text += ["| " + " | ".join(cell(one) for _, cell in head) + " |" for one in document["results"]]
    return "\n".join([*text, "", _method(document), ""])


def as_html(document: Document) -> str:
    """The page."""
    plan, recommendation = document["plan"], document["recommendation"]
    title = plan["description"] or "Frontier"
    colors = {one["name"]: COLORS[place % len(COLORS)] for place, one in enumerate(plan["checkpoints"])}
    kind = VERDICT_KINDS.get(recommendation["verdict"], "open")
    parts: list[str | Chart] = [
        heading(title),
        paragraph(_method(document), "quiet"),
        verdict(kind, _verdict(document), recommendation["reasons"]),
        *(
            paragraph(f"{name} could not be served: {reason}", "warning")
            for name, reason in document["failures"].items()
        ),
        "<h2>All numbers</h2>",
        wide(_table(document), recommendation.get("names") or [recommendation["name"]]),
        "<h2>Charts</h2>",
        *decision_charts(document, colors),
        *_pareto(document, colors),
        *_latency(document, colors),
        *_domains(document, colors),
        *_memory(document),
    ]
    return page(title, parts)


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


def _table(document: Document) -> Table:
    columns = _columns(document)
    rows = [[cell(one) for _, cell in columns] for one in document["results"]]
    return Table([name for name, _ in columns], rows)


def _pareto(document: Document, colors: dict[str, str]) -> list[Chart]:
    charts = []
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
        title = f"Throughput against acc_norm: {name}"
        note = "up and to the right is better; the dotted steps are the Pareto frontier"
        frontier = document["pareto"][name]
        speed = "output tokens/s within the limits"
        charts.append(scatter(title, spots, frontier, speed, "acc_norm", percent=True, note=note))
    return charts


def _latency(document: Document, colors: dict[str, str]) -> list[Chart]:
    series = [
        Series(
            name,
            [
                Mark(one["offered_rps"], 1000 * one["ttft_p95_s"]["value"], *_milliseconds(one["ttft_p95_s"]))
                for one in rows
            ],
            colors[name],
        )
        for name, rows in document["latency"].items()
        if rows
    ]
    if not series:
        return []
    limit = document["plan"]["constraints"]["ttft_p95_s"]
    name = document["plan"]["scenarios"][0]["name"]
    limits = {"limit": 1000 * limit} if limit else {}
    title = f"Latency against rate: {name}"
    return [lines(title, "offered requests/s", "p95 time to first token, ms", series, limits)]


def _milliseconds(one: Document) -> tuple[float | None, float | None]:
    return tuple(None if one[end] is None else 1000 * one[end] for end in ("low", "high"))  # type: ignore[return-value]


def _domains(document: Document, colors: dict[str, str]) -> list[Chart]:
    """acc_norm by task, and perplexity of held-out text by domain; both under load."""
    found: dict[str, dict[str, list[Member]]] = {"acc_norm": {}, "perplexity": {}}
    for run in document["runs"]:
        for result in run["scenarios"].values():
            for task, both in (result.get("quality") or {}).get("tasks", {}).items():
                for kind, groups in found.items():
                    is_shown = kind == "acc_norm" or task.startswith("text:")
                    if task != "all" and is_shown and both["loaded"] and both["loaded"][kind]:
                        name = run["checkpoint"]
                        one = Member(name, colors[name], Estimate(**both["loaded"][kind]))
                        groups.setdefault(task.removeprefix("text:"), []).append(one)
    titles = {
        "acc_norm": ("Right answers by task", "acc_norm under load", "{:.1%}"),
        "perplexity": ("Perplexity by domain", "perplexity of held-out text, under load", "{:.4g}"),
    }
    return [
        intervals(title, _in_order(found[kind], colors), x_name, form)
        for kind, (title, x_name, form) in titles.items()
        if found[kind]
    ]


def _in_order(groups: dict[str, list[Member]], colors: dict[str, str]) -> dict[str, list[Member]]:
    order = list(colors)
    return {
        group: sorted(members, key=lambda one: order.index(one.name))
        for group, members in sorted(groups.items())
    }


def _memory(document: Document) -> list[Chart]:
    results = [one for one in document["results"] if one["memory_bytes"]]
    if not results:
        return []
    components = list(dict.fromkeys(component for one in results for component in one["memory_bytes"]))
    colors = {
        component: COMPONENT_COLORS[place % len(COMPONENT_COLORS)]
        for place, component in enumerate(components)
    }
    bars = [
        Bar(
            one["name"],
            {component: size / MIB for component, size in one["memory_bytes"].items()},
            f"{one['kv_tokens']:,} tokens of KV" if one["kv_tokens"] else "",
        )
        for one in results
    ]
    return [stacked_bars("Memory by component", bars, colors, "MiB")]
