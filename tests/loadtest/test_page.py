"""The page: well-formed, complete without other files, and with the numbers of the result."""

import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
from tests.loadtest.fake_openai import Reply

from lowbit_loadtest.generate.http.target import Target
from lowbit_loadtest.report.document import as_document
from lowbit_loadtest.report.page import as_html
from lowbit_loadtest.report.svg import Chart, Mark, Series, ticks
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


def test_the_page_needs_nothing_else_and_has_every_chart(timed_server: Callable[..., str]) -> None:
    url = timed_server(Reply(ttft_s=0.005, gap_s=0.001))
    data = {
        "description": "<b>mine</b>",
        "arrivals": {"kind": "ramp", "start_rps": 20, "growth": 2, "max_rps": 40, "stage_s": 0.5},
        "prompts": {"kind": "text"},
        "slo": {"ttft_s": 9},
        "generator": {"workers": 1, "max_lag_s": 10},
    }
    scenario = parse_scenario(data, "test")
    result = run_load_test(scenario, Target(url), lambda title, requests: lambda tally: None)
    page = as_html(as_document(scenario, result, "now", requests=True))
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert page.count("<svg") == 10  # four latencies against rate, throughput, four percentiles, one in time
    assert not re.search(r"(src|href)=|url\(|@import", page)
    assert "&lt;b&gt;mine&lt;/b&gt;" in page
    assert "highest rate that meets the SLOs: 40 requests/s" in page


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.0, 0.0), (0.0, 7.3e-5), (3.0, 1234.0), (0.0, 99.999)]
)
def test_ticks_are_few_and_hold_the_range(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 9


def test_marks_stay_inside_the_picture() -> None:
    chart = Chart("t", "x", "y", [Series("s", [Mark(1, 5, 4, 9), Mark(80, 2, 0, 3)])], {"limit": 12})
    numbers = [float(number) for number in re.findall(r'c[xy]="([-\d.]+)"', chart.svg())]
    assert all(0 <= number <= 640 for number in numbers)
    assert len(numbers) == 4
    assert "nothing was measured" in Chart("t", "x", "y", [Series("s", [])]).svg()
