"""`lowbit compare`: verdicts on runs whose difference is known, what is refused, and exit statuses."""

import argparse
import copy
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_core.errors import ConfigError
from lowbit_core.evals.results import as_rows
from lowbit_core.evals.scoring import Answer
from lowbit_loadtest.compare.comparison import Comparison
from lowbit_loadtest.compare.comparison import compare as compare_measured
from lowbit_loadtest.compare.outcomes import judge
from lowbit_loadtest.compare.readers import lowbit
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


def compare(a: dict[str, Any], b: dict[str, Any], tolerance: float, draws: int = 200) -> Comparison:
    return compare_measured(lowbit.read(a, "a"), lowbit.read(b, "b"), tolerance, draws=draws)


def verdicts(a: dict[str, Any], b: dict[str, Any], tolerance: float = 0.05) -> set[str]:
    return {one.verdict for one in compare(a, b, tolerance).differences}


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
        row["acc_norm"] = row["chosen"] = None  # they were right in A, and no answer is no right answer
    found = {one.metric: one for one in compare(judged_items(200, -100.0), unanswered, 0.05).differences}
    assert found["acc_norm"].a == pytest.approx(200 / 300)
    assert found["acc_norm"].b == pytest.approx(60 / 300)
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


def failing(found: dict[str, Any], places: Sequence[int], outcome: str = "failed") -> dict[str, Any]:
    """The document with some requests failed, which keep their times: a 500 comes fast, and a cut stream has chunks."""
    changed = copy.deepcopy(found)
    for place in places:
        changed["points"][0]["request_table"]["rows"][place][REQUEST_COLUMNS.index("outcome")] = outcome
    return changed


def test_a_server_that_drops_requests_is_worse_however_fast() -> None:
    comparison = compare(document(), failing(document(0.5, 1), range(0, 600, 4), "rejected"), 0.05)
    assert comparison.verdict == "worse"
    completed, rejected = comparison.outcomes
    assert (completed.outcome, completed.verdict, rejected.outcome) == ("completed", "worse", "rejected")
    assert (completed.count_a, completed.count_b, rejected.count_b) == (590, 444, 146)
    assert completed.interval.low <= completed.change <= completed.interval.high < -0.2


def test_a_failure_is_never_a_latency() -> None:
    """Times of requests that failed are in the file, and in no number: A's and B's medians are of the answers."""
    slow = document(3.0, 1)
    dropped = failing(slow, [place for place in range(600) if place % 10 == 0])
    of_all, of_rest = (compare(document(), one, 0.05).differences for one in (slow, dropped))
    times = [row[REQUEST_COLUMNS.index("ttft_s")] for row in slow["points"][0]["request_table"]["rows"]]
    kept = [time for place, time in enumerate(times) if place % 10 and place % 300 >= 5]
    assert of_rest[0].b == pytest.approx(np.median(kept))
    assert of_all[0].b != of_rest[0].b


def test_dropping_the_slow_requests_makes_nothing_look_faster() -> None:
    """B is as A, and fails the slowest tenth: its p95 of answers is far lower, and its verdict is not."""
    whole = document(1.0, 1)
    column = REQUEST_COLUMNS.index("ttft_s")
    rows = whole["points"][0]["request_table"]["rows"]
    slowest = sorted(range(len(rows)), key=lambda place: -rows[place][column])[:60]
    comparison = compare(document(), failing(whole, slowest), 0.05)
    assert comparison.verdict == "worse"
    p95 = next(one for one in comparison.differences if one.metric == "time to first token p95")
    assert p95.verdict == "worse"
    apart = compare(document(seed=1), failing(whole, slowest), 0.05)
    p95 = next(one for one in apart.differences if one.metric == "time to first token p95")
    assert (p95.change < -0.2, p95.verdict, p95.completed_alone) == (True, "worse", "better")


GOODNESS = {
    "b_completed_nothing": 0,
    "a_completed_nothing": 0,
    "worse": 1,
    "undecided": 2,
    "same": 2,
    "better": 3,
}


@settings(max_examples=25, deadline=None)
@given(
    factor=st.sampled_from([0.6, 0.97, 1.0, 1.04, 1.3]),
    requests=st.sampled_from([6, 24, 60]),
    paired=st.booleans(),
    already=st.floats(0, 0.3),
    more=st.floats(0, 1),
    which=st.sampled_from(["slowest", "fastest", "any"]),
    outcome=st.sampled_from(["failed", "rejected", "cut_off", "timed_out"]),
    seed=st.integers(0, 5),
)
def test_turning_answers_into_failures_never_makes_a_verdict_better(
    factor: float,
    requests: int,
    paired: bool,
    already: float,
    more: float,
    which: str,
    outcome: str,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    a = failing(
        document(requests=requests), [place for place in range(2 * requests) if rng.random() < already / 2]
    )
    b = document(factor, 1, requests, seed=0 if paired else 1)
    times = [row[REQUEST_COLUMNS.index("ttft_s")] for row in b["points"][0]["request_table"]["rows"]]
    places = {
        "slowest": np.argsort(times)[::-1],
        "fastest": np.argsort(times),
        "any": rng.permutation(len(times)),
    }
    order = [int(place) for place in places[which]]
    before = failing(b, order[: int(already * len(order))], outcome)
    after = failing(before, order[: int(max(already, more) * len(order))], outcome)
    found = [compare(a, one, 0.05, draws=60) for one in (before, after)]
    assert GOODNESS[found[1].verdict] <= GOODNESS[found[0].verdict]
    verdicts_before, verdicts_after = (
        {one.metric: GOODNESS[one.verdict] for one in comparison.differences} for comparison in found
    )
    for metric in verdicts_before.keys() & verdicts_after.keys():
        assert verdicts_after[metric] <= verdicts_before[metric]


@pytest.mark.parametrize("side", ["a", "b", "both"])
@pytest.mark.parametrize("requests", [1, 300])
def test_a_side_that_completed_nothing_has_a_verdict_of_its_own_and_status_1(
    side: str, requests: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every request of it a fast 500; with --tolerance 0.99 too."""
    a, b = document(requests=10 + requests), document(0.01, 1, 10 + requests)
    everything = range(2 * (10 + requests))
    a = failing(a, everything) if side in ("a", "both") else a
    b = failing(b, everything) if side in ("b", "both") else b
    found = compare(a, b, 0.99)
    assert found.verdict == ("a_completed_nothing" if side == "a" else "b_completed_nothing")
    assert not found.differences
    with caplog.at_level(logging.INFO, "lowbit"):
        assert lowbit_compare(tmp_path, a, b, "--tolerance", "0.99", "--completed-tolerance", "0.99") == 1
    assert f"{'A' if side == 'a' else 'B'} completed no request" in caplog.text


def test_few_completed_requests_are_said_and_judge_nothing() -> None:
    found = compare(document(requests=12), document(0.2, 1, requests=12), 0.05)
    assert found.verdict == "undecided"
    assert {one.verdict for one in found.differences} == {"undecided"}
    assert [note for note in found.notes if "B completed 14 of 14 requests at 4 requests/s: too few" in note]


def test_turns_that_were_not_sent_after_a_failure_are_not_forgotten() -> None:
    one = document()
    other = failing(document(), [17])
    other["points"][0]["not_sent"] = 90
    found = compare(one, other, 0.05)
    assert [(one.outcome, one.count_b) for one in found.outcomes] == [
        ("completed", 589),
        ("failed", 1),
        ("not sent", 90),
    ]
    assert found.verdict == "worse"
    assert compare(one, other | {"interrupted": True}, 0.05).outcomes[-1].outcome == "failed"


def test_joules_and_money_are_judged_over_repetitions() -> None:
    def costing(joules: list[float], price: float) -> dict[str, Any]:
        found = document()
        rows = [
            {"joules_per_output_token": one, "price_per_million_output_tokens": price + one} for one in joules
        ]
        found["points"][0]["cost"] = {"repetitions": rows}
        return found

    found = compare(costing([2.0, 2.1, 1.9], 1), costing([3.0, 3.2, 2.9], 1), 0.05).differences
    judged = {one.metric: one.verdict for one in found[-2:]}
    assert judged == {"joules per output token": "worse", "price of a million output tokens": "worse"}


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
        ({"kind": "other"}, "b.json is not a result of lowbit loadtest --json, AIPerf"),
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
