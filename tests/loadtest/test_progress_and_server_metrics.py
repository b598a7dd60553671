"""What is shown while a run goes, and what is read from /metrics."""

import io
import logging

import pytest
from rich.console import Console

from lowbit_loadtest.generate.driver import Tally
from lowbit_loadtest.generate.records import Outcome, RequestRecord
from lowbit_loadtest.report.progress import describe, progress
from lowbit_loadtest.report.server_metrics import check_usage, parse_metrics

TALLY = Tally(in_flight=3, outcomes={"completed": 11, "rejected": 1}, output_tokens=480)


def test_progress_names_what_went_wrong() -> None:
    assert describe(TALLY, 60) == "12 of 60 ended (1 rejected), 3 in flight, 480 tokens"
    assert describe(Tally(), None) == "0 ended, 0 in flight, 0 tokens"


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines(caplog: pytest.LogCaptureFixture) -> None:
    screen = io.StringIO()
    with progress(Console(file=screen, force_terminal=True, width=160)) as on_run:
        on_run("4 requests/s", 60)(TALLY)
    assert "4 requests/s" in screen.getvalue()
    pipe = io.StringIO()
    logging.getLogger("lowbit").propagate = True
    with caplog.at_level(logging.INFO, "lowbit"), progress(Console(file=pipe)) as on_run:
        on_run("4 requests/s", 60)(TALLY)
    assert pipe.getvalue() == ""
    assert "4 requests/s: starting" in caplog.text


def test_metrics_are_added_over_labels_and_unknown_ones_are_left_out() -> None:
    text = """# HELP vllm:generation_tokens_total x
vllm:generation_tokens_total{engine="0",model_name="m"} 10.0
vllm:generation_tokens_total{engine="1",model_name="a \\"b\\" {c} 7"} 5.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:kv_cache_usage_perc{engine="1"} 0.75
lowbit_memory_bytes{component="weights",device="cpu"} 1.1e+08
other_total 3
"""
    expected = {"generation_tokens": 15.0, "kv_cache_usage": 0.75, "memory_weights_bytes": 1.1e8}
    assert parse_metrics(text) == expected


def test_usage_check_claims_no_more_than_it_can_know() -> None:
    done = RequestRecord(Outcome.COMPLETED, 0, 1, output_tokens=5)
    lost = RequestRecord(Outcome.CUT_OFF, 0, 1)

    def agrees(counter: float, records: list[RequestRecord]) -> bool | None:
        check = check_usage({"generation_tokens": counter}, records)
        assert check is not None
        return check.agrees

    assert agrees(10, [done, done]) is True
    assert agrees(12, [done, done]) is False
    assert agrees(12, [done, done, lost]) is None  # the lost request may have had two
    assert agrees(9, [done, done, lost]) is False
    assert check_usage(None, [done]) is None
