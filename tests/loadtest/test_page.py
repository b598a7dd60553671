"""The page: well-formed, complete without other files, and with the numbers of the result."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from tests.loadtest.fake_openai import Reply
from tests.loadtest.test_compare import document, failing
from tests.page_checks import check_page, specs

from lowbit_core.pages import html
from lowbit_loadtest.compare.comparison import compare
from lowbit_loadtest.compare.page import as_html as compare_page
from lowbit_loadtest.compare.readers import lowbit
from lowbit_loadtest.frontier.charts import decision_charts
from lowbit_loadtest.generate.http.target import Target
from lowbit_loadtest.generate.records import Interval, Outcome, RequestRecord
from lowbit_loadtest.report.curves import curve_charts
from lowbit_loadtest.report.document import as_document
from lowbit_loadtest.report.page import as_html
from lowbit_loadtest.report.summary import Run, summarize
from lowbit_loadtest.runner import run_load_test
from lowbit_loadtest.scenario import parse_scenario


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


def test_a_comparison_has_a_page_with_its_verdict_first() -> None:
    a, b = (lowbit.read(one, "x") for one in (document(), failing(document(1.2, 1), range(0, 600, 5))))
    page = compare_page(compare(a, b, 0.05, draws=40), ("a.json", "<b>.json"), {"tolerance": 0.05})
    check_page(page)
    assert "B against A: worse" in page
    assert "&lt;b&gt;.json" in page
    assert page.index("How the requests ended") < page.index("What changed")
    nothing = compare(a, lowbit.read(failing(document(), range(600)), "x"), 0.05, draws=40)
    page = compare_page(nothing, ("a", "b"), {"tolerance": 0.05})
    check_page(page)
    assert "B completed no request" in page


def point(streams: float, prompt_tokens: float) -> dict[str, Any]:
    records = tuple(
        RequestRecord(
            Outcome.COMPLETED,
            at,
            at + streams,
            (at + 0.1, at + streams),
            finished_s=at + streams,
            output_tokens=9,
        )
        for at in (0.0, 1.0, 2.0)
    )
    found = asdict(summarize([Run(records, Interval(0.0, 9.0))], intervals=False))
    setting = {"concurrency": streams, "prompt_tokens": prompt_tokens}
    return {**found, "setting": setting, "offered_rps": None, "cost": None}


def test_a_sweep_of_two_keys_has_a_curve_along_the_first_for_each_value_of_the_second() -> None:
    points = [point(streams, tokens) for tokens in (512.0, 2048.0) for streams in (4.0, 1.0, 2.0)]
    charts = curve_charts(points, {})
    assert {chart.title.partition(" against ")[2] for chart in charts} == {
        "concurrency (prompt tokens 512)",
        "concurrency (prompt tokens 2048)",
    }
    end_to_end = next(chart for chart in charts if chart.title.startswith("end to end"))
    assert [row[0] for row in end_to_end.table.rows] == ["1", "2", "4"]
    assert [row[1] for row in end_to_end.table.rows] == ["1000", "2000", "4000"]
    check_page(html.page("t", charts))


def test_a_decision_shows_each_measured_claim_with_its_margin_or_limit() -> None:
    def claim(
        name: str, kind: str, settled: str, value: float, half: float | None, **of: Any
    ) -> dict[str, Any]:
        ends = {"low": None, "high": None} if half is None else {"low": value - half, "high": value + half}
        return {"name": name, "kind": kind, "one": "a", "other": "b", "value": value, "settled": settled} | ends | {
            "limit": None, "margin": None, **of,
        }  # fmt: skip

    decision = {
        "objective": "throughput",
        "accuracy": "acc_norm",
        "margins": {"objective": 0.03, "accuracy": 0.01},
        "claims": [
            claim("throughput", "round", "equal", 1.01, 0.01, margin=0.03),
            claim("acc_norm", "questions", "undecided", 0.004, None, margin=0.01),
            claim("kl_from_base", "texts", "met", 0.1, 0.02, limit=0.2),
            claim("acc_norm_of_base", "questions", "missed", -0.1, 0.02, limit=0.0),
            claim("kl_from_base", "texts", "undecided", 0.0, None, limit=0.2, one="c") | {"value": None},
        ],
        "rounds": {"a": [{"number": 1, "throughput": 90.0}, {"number": 2, "throughput": None}]},
        "timeline": [
            {"kind": "begin", "checkpoint": None, "at_s": 0.0, "seconds": 0.0},
            {"kind": "round", "checkpoint": "a", "at_s": 0.0, "seconds": 90.0},
        ],
        "out": [{"name": "a", "at_s": 9.0, "reason": "slow"}],
    }
    charts = decision_charts({"decision": decision}, {"a": "#000"})
    check_page(html.page("t", charts))
    rows = {chart.title: chart.table.rows for chart in charts}
    assert rows["compared in throughput"] == [["a against b", "+1.0% [+0.0%–+2.0%]", "equal"]]
    assert rows["compared in acc norm"] == [["a against b", "+0.4%", "undecided"]]
    assert rows["limit: kl from base"] == [["a", "0.100 [0.080–0.120]", "met"]]
    assert rows["where the time went"][0][:3] == ["a", "0", "1.5"]
    assert decision_charts({"decision": None}, {}) == []
