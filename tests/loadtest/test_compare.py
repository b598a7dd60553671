"""`lowbit compare`: verdicts on runs whose difference is known, what is refused, and exit statuses."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowbit_core.errors import ConfigError
from lowbit_core.evals.results import as_rows
from lowbit_core.evals.scoring import Answer
from lowbit_loadtest.compare import compare, judge
from lowbit_loadtest.compare_cli import command
from lowbit_loadtest.report.document import FORMAT_VERSION, REQUEST_COLUMNS
from lowbit_loadtest.report.statistics import Bounds


def document(
    factor: float = 1.0, noise_seed: int = 0, requests: int = 300, **scenario: Any
) -> dict[str, Any]:
    """A made-up result: latencies are lognormal and the same for every document, apart from factor and 2 % noise."""
    common = np.random.default_rng(9).lognormal(-2, 0.7, (2, requests))
    noise = np.random.default_rng(noise_seed).normal(1, 0.02, (2, requests))
    ttft_s = common * factor * noise
    rows = []
    for repetition, index in np.ndindex(2, requests):
        ttft = float(ttft_s[repetition, index])
        values = {
            "repetition": repetition,
            "index": index,
            "turn": 0,
            "warm_up": index < 5,
            "outcome": "completed",
        }
        values |= {"ttft_s": ttft, "tpot_s": ttft / 10, "e2e_s": ttft * 2}
        rows.append([values.get(column) for column in REQUEST_COLUMNS])
    point = {"offered_rps": 4.0, "request_table": {"columns": list(REQUEST_COLUMNS), "rows": rows}}
    head = {"kind": "lowbit.loadtest", "format_version": FORMAT_VERSION, "valid": True, "invalid_because": []}
    return head | {"scenario": {"seed": 0, "model": "a", **scenario}, "points": [point]}


def verdicts(a: dict[str, Any], b: dict[str, Any], tolerance: float = 0.05) -> set[str]:
    return {one.verdict for one in compare(a, b, tolerance).differences if one.metric != "share completed"}


def test_twenty_percent_more_is_worse_and_less_is_better() -> None:
    assert verdicts(document(), document(1.2, 1)) == {"worse"}
    assert verdicts(document(), document(0.8, 1)) == {"better"}


def test_the_same_is_the_same_when_paired_and_undecided_when_not() -> None:
    """Pairing cancels what makes a request slow in both: a lognormal spread of 0.7 against 2 % noise."""
    paired = compare(document(), document(1.0, 1, model="b"), 0.05)
    assert paired.paired
    assert paired.verdict == "same"
    apart = compare(document(), document(1.0, 1, seed=1), 0.05)
    assert not apart.paired
    assert apart.verdict == "undecided"


def test_intervals_hold_the_true_change() -> None:
    for one in compare(document(), document(1.1, 3), 0.05).differences[:6]:
        assert one.interval is not None
        assert one.interval.low <= 0.1 <= one.interval.high or abs(one.change - 0.1) < 0.01


def closed(rates: list[float], seed: int = 0) -> dict[str, Any]:
    found = document(seed=seed)
    found["points"][0] |= {
        "offered_rps": None,
        "repetition_rates": [{"output_tokens_per_s": rate} for rate in rates],
    }
    return found


def test_throughput_of_a_closed_loop_is_judged_over_repetitions() -> None:
    """The machine's drift is in both: 100, 130, 90 against ten percent more of each."""
    drifting = [100.0, 130.0, 90.0]
    tenth = [110.0, 143.1, 98.9]

    def judged(b: dict[str, Any]) -> Any:
        return next(
            one for one in compare(closed(drifting), b, 0.05).differences if one.metric == "output tokens/s"
        )

    better = judged(closed(tenth))
    assert better.verdict == "better"
    assert better.change == pytest.approx(0.1, abs=1e-3)
    assert better.interval.low < 0.1 < better.interval.high < 0.11
    assert judged(closed([rate / 1.2 for rate in drifting])).verdict == "worse"
    assert judged(closed(drifting)).verdict == "same"
    assert judged(closed(tenth, seed=1)).verdict == "undecided"  # not paired: the drift is noise
    assert judged(closed(tenth[:1])).interval is None
    open_loop = compare(document(), document(0.8, 1), 0.05)
    assert "output tokens/s" not in {one.metric for one in open_loop.differences}


def judged_items(right: int, logprob: float) -> dict[str, Any]:
    """300 questions of which the first `right` are answered rightly, and 20 texts of 50 tokens."""
    answers = [
        Answer(("arc", str(number)), "choice", None, number < right, int(number >= right), None, 0)
        for number in range(300)
    ]
    answers += [
        Answer(("text", str(number)), "text", None, None, None, logprob * (1 + number / 99), 50)
        for number in range(20)
    ]
    rows = as_rows({answer.key: answer for answer in answers})
    return document() | {"quality": {"answers": {"idle": [], "loaded": rows}}}


def test_quality_under_load_is_judged_item_by_item() -> None:
    def judged(right: int, logprob: float) -> dict[str, Any]:
        found = compare(judged_items(200, -100.0), judged_items(right, logprob), 0.05).differences
        return {one.metric: one for one in found if one.metric in ("acc_norm", "perplexity")}

    worse = judged(160, -130.0)
    assert (worse["acc_norm"].verdict, worse["perplexity"].verdict) == ("worse", "worse")
    assert worse["acc_norm"].change == pytest.approx(-0.2)
    assert worse["perplexity"].change == pytest.approx(np.exp(0.6 * (1 + 9.5 / 99)) - 1, rel=1e-3)
    unanswered = judged_items(160, -100.0)
    for row in unanswered["quality"]["answers"]["loaded"][:100]:
        row["acc_norm"] = row["chosen"] = None  # they were right in A and count in neither
    found = {one.metric: one for one in compare(judged_items(200, -100.0), unanswered, 0.05).differences}
    assert found["acc_norm"].a == pytest.approx(100 / 200)
    assert found["acc_norm"].b == pytest.approx(60 / 200)
    with pytest.raises(ConfigError, match="cannot be read"):
        compare(judged_items(1, -1.0), document() | {"quality": {"answers": {"loaded": [{}]}}}, 0.05)
    same = judged(200, -100.0)
    assert (same["acc_norm"].verdict, same["perplexity"].verdict) == ("same", "same")


@pytest.mark.parametrize(
    ("change", "low", "high", "verdict"),
    [
        (0.2, 0.1, 0.3, "worse"),
        (-0.2, -0.3, -0.1, "better"),
        (0.2, -0.1, 0.4, "undecided"),
        (0.03, 0.02, 0.04, "same"),
        (0.04, 0.01, 0.07, "undecided"),
    ],
)
def test_a_verdict_needs_an_interval_without_zero_and_more_than_the_tolerance(
    change: float, low: float, high: float, verdict: str
) -> None:
    assert judge(change, Bounds(low, high), 0.05, lower_is_better=True) == verdict
    swapped = {"worse": "better", "better": "worse"}.get(verdict, verdict)
    assert judge(change, Bounds(low, high), 0.05, lower_is_better=False) == swapped
    assert judge(change, None, 0.05, lower_is_better=True) == "undecided"


def test_a_server_that_drops_requests_is_worse_however_fast() -> None:
    dropping = document(0.5, 1)
    rows = dropping["points"][0]["request_table"]["rows"]
    for row in rows[::4]:
        row[REQUEST_COLUMNS.index("outcome")] = "rejected"
        for column in ("ttft_s", "tpot_s", "e2e_s"):
            row[REQUEST_COLUMNS.index(column)] = None
    comparison = compare(document(), dropping, 0.05)
    assert comparison.verdict == "worse"
    assert [one.metric for one in comparison.differences if one.verdict == "worse"] == ["share completed"]


def lowbit_compare(tmp_path: Path, a: object, b: object, *flags: str) -> int:
    paths = []
    for name, one in (("a.json", a), ("b.json", b)):
        paths.append(tmp_path / name)
        paths[-1].write_text(one if isinstance(one, str) else json.dumps(one))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([*map(str, paths), *flags]))


def test_exit_status_is_for_ci(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lowbit_compare(tmp_path, document(), document(1.0, 1)) == 0
    assert lowbit_compare(tmp_path, document(), document(1.2, 1)) == 1
    assert lowbit_compare(tmp_path, document(), document(1.2, 1), "--tolerance", "0.5") == 0
    assert lowbit_compare(tmp_path, document(), document(1.0, 1, seed=1)) == 0
    assert lowbit_compare(tmp_path, document(), document(1.0, 1, seed=1), "--strict") == 1
    assert json.loads(capsys.readouterr().out.splitlines()[1])["verdict"] == "worse"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "other"}, "b.json is not a result of lowbit loadtest"),
        ({"format_version": 2}, "has format 2, this version reads 3"),
        ({"valid": False, "invalid_because": ["sends were late"]}, r"is invalid \(sends were late\)"),
        ({"points": [{"offered_rps": 4.0}]}, "has no requests; give the file that --json wrote"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lowbit_compare(tmp_path, document(), document() | changes)


def test_an_invalid_run_is_compared_only_on_request(tmp_path: Path) -> None:
    invalid = document(1.2, 1) | {"valid": False, "invalid_because": ["sends were late"]}
    assert lowbit_compare(tmp_path, document(), invalid, "--allow-invalid") == 1
