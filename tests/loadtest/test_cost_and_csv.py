"""Joules and money of a token against cases by hand, and the tables for spreadsheets."""

import csv
import io
from pathlib import Path

import pytest

from lowbit_loadtest.generate.records import Interval, Outcome, RequestRecord
from lowbit_loadtest.report.cost import cost_of
from lowbit_loadtest.report.csv_tables import requests_csv, summary_csv, write_csv
from lowbit_loadtest.report.server_metrics import parse_metrics, summarize_samples
from lowbit_loadtest.report.summary import Run

DCGM = 'DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{{gpu="0"}} {0}\nDCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{{gpu="1"}} {0}\n'


def run(tokens: int | None = 100, outcome: Outcome = Outcome.COMPLETED) -> Run:
    return Run((RequestRecord(outcome, 0.0, 1.0, output_tokens=tokens),), Interval(0.0, 1.0))


def test_energy_of_a_fake_metrics_page_is_summed_over_gpus_and_is_in_joules() -> None:
    """DCGM counts millijoules; no machine here has such counters, so the pages are made up."""
    samples = [parse_metrics(DCGM.format(value)) for value in (1_000_000, 1_250_000)]
    found = summarize_samples(samples, [0.0, 10.0])
    assert found is not None
    assert found["energy_joules"] == pytest.approx(500.0)
    assert cost_of([run(100)], [found], [{}], None).joules_per_output_token == pytest.approx(5.0)


def test_power_is_integrated_over_the_times_of_the_scrapes() -> None:
    samples = [parse_metrics(f"DCGM_FI_DEV_POWER_USAGE {watts}\n") for watts in (100, 300, 300)]
    found = summarize_samples(samples, [0.0, 1.0, 3.0])
    assert found is not None
    assert found["energy_joules"] == pytest.approx(200.0 + 600.0)


def test_a_server_without_such_metrics_has_no_joules() -> None:
    found = summarize_samples([{"generation_tokens": 1.0}, {"generation_tokens": 9.0}], [0.0, 1.0])
    assert cost_of([run()], [found or {}], [{}], None).joules_per_output_token is None
    assert cost_of([run(), run()], [{"energy_joules": 5.0}], [{}, {}], None).joules_per_output_token is None


def test_energy_of_failures_is_paid_for_by_the_answers_and_unknown_tokens_stay_unknown() -> None:
    both = Run((*run(50).records, *run(50, Outcome.FAILED).records), Interval(0.0, 1.0))
    assert cost_of([both], [{"energy_joules": 100.0}], [{}], None).joules_per_output_token == 2.0
    assert cost_of([run(None)], [{"energy_joules": 100.0}], [{}], None).joules_per_output_token is None


def test_a_million_tokens_cost_the_price_of_the_time_they_take() -> None:
    """100 tokens/s take 10,000 s for a million: 2.78 hours at 3.60 an hour are 10."""
    rates: list[dict[str, float | None]] = [{"output_tokens_per_s": 100.0, "total_tokens_per_s": 400.0}] * 2
    found = cost_of([run(), run()], [], rates, 3.6)
    assert found.price_per_million_output_tokens == pytest.approx(10.0)
    assert found.price_per_million_tokens == pytest.approx(2.5)
    assert found.intervals["price_per_million_tokens"].low == pytest.approx(2.5)
    assert cost_of([run()], [], [{"output_tokens_per_s": None}], 3.6).price_per_million_output_tokens is None
    assert cost_of([run()], [], rates[:1], None).price_per_million_output_tokens is None


POINTS = [
    {
        "offered_rps": rate,
        "outcomes": {"completed": 1},
        "ttft_s": ttft,
        "details": {"=cmd|' /C calc'!A0": 3},
        "setting": {"rate_rps": rate},
        "request_table": {"columns": ["index", "ttft_s"], "rows": [[0, 0.5], [1, None]]},
    }
    for rate, ttft in ((1.0, {"p50": 0.5}), (2.0, None))
]


def test_csv_has_a_row_for_each_rate_and_one_for_each_request(tmp_path: Path) -> None:
    rates, requests = (
        list(csv.DictReader(io.StringIO(table({"points": POINTS})))) for table in (summary_csv, requests_csv)
    )
    assert [row["offered_rps"] for row in rates] == ["1.0", "2.0"]
    assert [row["ttft_s.p50"] for row in rates] == ["0.5", ""]
    assert [(row["offered_rps"], row["index"], row["ttft_s"]) for row in requests] == [
        ("1.0", "0", "0.5"), ("1.0", "1", ""), ("2.0", "0", "0.5"), ("2.0", "1", ""),
    ]  # fmt: skip
    assert not [name for name in rates[0] if name.startswith("details")]  # a server's words are no formula
    write_csv({"points": POINTS}, tmp_path / "a.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.requests.csv"]
