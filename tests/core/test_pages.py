"""The look of pages: every kind of chart is drawn, has its numbers beside it, and holds names that are no markup."""

from tests.page_checks import check_page

from lowbit_core.evals.arithmetic import Estimate
from lowbit_core.pages import html
from lowbit_core.pages.chart import Mark, Series, Table, lines
from lowbit_core.pages.plots import Bar, Member, Spot, dots, intervals, scatter, stacked_bars


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
        lines(
            "log",
            "layer",
            "error",
            [Series("a", [Mark(0, 0.0), Mark(1, 0.1, 0.0, 0.2), Mark(2, 0.3)])],
            log=True,
        ),
        intervals("log", {"g": [Member("", "#000", unknown)], "none": []}, "x", log=True),
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
    assert charts[0].table.rows == [["0", "0"], ["1", "0.1 [0–0.2]"], ["2", "0.3"]]
    assert charts[2].table.rows == [["p50", "1"], ["p99", "2"]]
    assert charts[3].table.rows[0] == ["a", "0.5 [0.4–0.6]", "50.0% [40.0%–60.0%]"]
    assert charts[5].table.rows == [["g", "+50.0% [+40.0%–+60.0%]", "worse"]]


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
