"""The page: well-formed, complete without other files, and with the numbers of the result."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import vl_convert
from tests.loadtest.fake_openai import Reply

from lowbit_core.evals.arithmetic import Estimate
from lowbit_loadtest.generate.http.target import Target
from lowbit_loadtest.report import html
from lowbit_loadtest.report.chart import Mark, Series, Table, lines
from lowbit_loadtest.report.document import as_document
from lowbit_loadtest.report.html import library
from lowbit_loadtest.report.page import as_html
from lowbit_loadtest.report.plots import Bar, Member, Spot, dots, intervals, scatter, stacked_bars
from lowbit_loadtest.runner import run_load_test
from lowbit_loadtest.scenario import parse_scenario

VOID = {"meta", "br"}


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def outside_the_library(page: str) -> str:
    """The page without Vega's script."""
    assert library() in page
    return page.replace(library(), "")


def specs(page: str) -> list[dict[str, Any]]:
    return [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', page)]


def check_page(page: str) -> None:
    """Whole, alone, small, and every chart is one that Vega-Lite draws, with a table beside it."""
    assert len(page.encode()) <= 5_000_000
    rest = outside_the_library(page)
    parser = Balanced()
    parser.feed(rest)
    assert parser.open == []
    assert not re.search(r"\s(src|href)=|url\(|@import|fetch\(|//cdn", rest)
    assert rest.count("<figure>") == rest.count('<div class="numbers">') >= 1
    for spec in specs(page):
        assert vl_convert.vegalite_to_svg({**spec, "width": 350}).startswith("<svg")


def test_the_page_needs_nothing_else_and_has_every_chart(timed_server: Callable[..., str]) -> None:
    url = timed_server(Reply(ttft_s=0.005, gap_s=0.001))
    data = {
        "description": "<b>mine</b></script>",
        "arrivals": {"kind": "ramp", "start_rps": 20, "growth": 2, "max_rps": 40, "stage_s": 0.5},
        "prompts": {"kind": "text"},
        "slo": {"ttft_s": 9},
        "generator": {"workers": 1, "max_lag_s": 10},
    }
    scenario = parse_scenario(data, "test")
    result = run_load_test(scenario, Target(url), lambda title, requests: lambda tally: None)
    page = as_html(as_document(scenario, result, "now", requests=True, price_per_hour=2.0))
    check_page(page)
    assert (
        len(specs(page)) == 12
    )  # four latencies, requests, tokens and price against rate, four percentiles, requests
    assert "&lt;b&gt;mine&lt;/b&gt;&lt;/script&gt;" in page
    assert "highest rate that meets the SLOs: 40 requests/s" in page
    assert "price/M output tokens" in page


def test_names_cannot_end_a_chart_s_data() -> None:
    chart = lines(
        "t</script><script>", "x", "y", [Series("</script>", [Mark(1, 5, 4, 9), Mark(80, 2)])], {"</i>": 3}
    )
    page = html.page("t", [chart])
    check_page(page)
    assert page.count("</script>") == 3  # the data, the library and what draws


def test_every_kind_of_chart_is_drawn_and_tells_its_numbers() -> None:
    known, unknown = Estimate(0.5, 0.4, 0.6), Estimate(2.0, None, None)
    charts = [
        lines("ordered", "percentile", "ms", [Series("a", [Mark("p50", 1.0), Mark("p99", 2.0)])]),
        scatter(
            "s", [Spot("a", "#000", known, known), Spot("b", "#111", unknown, unknown)], ["a"], "x", "y", True
        ),
        intervals("i", {"g": [Member("a", "#000", known), Member("b", "#111", unknown)]}, "x"),
        intervals("i", {"g": [Member("", "#000", known, "worse")]}, "x", "{:+.1%}", 0.0, 0.05),
        stacked_bars("b", [Bar("a", {"p": 1.0}, "n"), Bar("b", {})], {"p": "#000", "q": "#111"}, "MiB"),
        dots("d", "s", "ms", [(0.0, 1.0)], [(1.0, "failed")], Table(["s"], [["0"]])),
    ]
    check_page(html.page("t", charts))
    assert charts[0].table.rows == [["p50", "1"], ["p99", "2"]]
    assert charts[1].table.rows[0] == ["a", "0.5 [0.4–0.6]", "50.0% [40.0%–60.0%]"]
    assert charts[3].table.rows == [["g", "+50.0% [+40.0%–+60.0%]", "worse"]]


def test_nothing_to_draw_is_said() -> None:
    empty = [
        lines("none", "x", "y", [Series("a", [])]),
        scatter("none", [], [], "x", "y"),
        intervals("none", {}, "x"),
        stacked_bars("none", [], {}, "x"),
        dots("none", "x", "y", [], [], Table(["x"], [])),
    ]
    page = html.page("t", empty)
    assert page.count("Nothing was measured") == 5
    assert "<script" not in page
