"""The knee of a sweep: where it is known, that it is named; where there is none, that none is."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lowbit_loadtest.generate.records import Interval, Outcome, RequestRecord
from lowbit_loadtest.knees import knees_of, throughput_of_slices
from lowbit_loadtest.measured import Measured, Sent, make_point
from lowbit_loadtest.rates import at_setting, settings_to_measure
from lowbit_loadtest.report.knee import FEW, FLAT, NO_KNEE, find_knee, kneedle
from lowbit_loadtest.report.result import Point
from lowbit_loadtest.report.summary import Run
from lowbit_loadtest.report.text import knee_text
from lowbit_loadtest.scenario import Scenario, parse_scenario

POWERS = [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("knee", [4, 8, 16, 32])
def test_a_curve_that_grows_and_then_stays_has_its_knee_where_it_stops_growing(knee: int) -> None:
    assert kneedle(POWERS, [min(x, knee) for x in POWERS])[0] == knee
    falling = [min(x, knee) - max(0, x - knee) / 100 for x in POWERS]
    assert kneedle(POWERS, falling)[0] == knee


@pytest.mark.parametrize(
    ("ys", "because"),
    [
        (POWERS, NO_KNEE),
        ([x**1.2 for x in POWERS], NO_KNEE),
        ([100, 101, 99, 100, 102, 101, 100], FLAT),
        ([7, 6, 5, 4, 3, 2, 1], FLAT),
        ([0, 0, 0, 0, 0, 0, 0], FLAT),
    ],
)
def test_a_curve_without_a_bend_has_no_knee(ys: list[float], because: str) -> None:
    assert kneedle(POWERS, ys) == (None, because)


def test_two_values_are_too_few() -> None:
    assert kneedle([1, 2], [1, 1.1]) == (None, FEW)


def test_the_interval_holds_the_true_knee_under_noise() -> None:
    """Slices scatter by 5 %; 40 sweeps of 8 slices each: the knee is in all but a few intervals."""
    rng = np.random.default_rng(1)
    truth = np.array([min(x, 16.0) for x in POWERS])
    found = [
        find_knee(
            "concurrency", {}, "output_tokens_per_s", POWERS, [t * rng.normal(1, 0.05, (1, 8)) for t in truth]
        )
        for _ in range(40)
    ]
    held = sum(one.low is not None and one.high is not None and one.low <= 16 <= one.high for one in found)
    assert held >= 38
    assert all(sum(one.shares.values()) == pytest.approx(1) for one in found)


def test_noise_that_hides_the_bend_widens_the_interval() -> None:
    rng = np.random.default_rng(2)
    gradual = np.array([x / (x + 16) for x in POWERS])
    sharp, blurred = (
        find_knee("concurrency", {}, "m", POWERS, [t * rng.normal(1, sd, (3, 8)) for t in gradual])
        for sd in (0.01, 0.5)
    )
    assert len(sharp.shares) < len(blurred.shares)


def closed_records(streams: int, seconds: float = 64.0, places: int = 8) -> tuple[RequestRecord, ...]:
    """A server with `places` places, one request a second in each: more streams wait in turn."""
    takes_s = max(1.0, streams / places)
    records: list[RequestRecord] = []
    for stream in range(streams):
        at_s = stream * takes_s / streams  # spread, so that ends do not coincide
        while at_s < seconds:
            end_s = at_s + takes_s
            record = RequestRecord(
                Outcome.COMPLETED, at_s, end_s, (at_s + takes_s / 2, end_s), finished_s=end_s, prompt_tokens=10,
                output_tokens=4, index=len(records),
            )  # fmt: skip
            records.append(record)
            at_s = end_s
    return tuple(sorted(records, key=lambda one: one.sent_s))


def swept(scenario: Scenario) -> list[Point]:
    points: list[Point] = []
    for setting in settings_to_measure(scenario, points):
        streams = int(setting["concurrency"])
        records = closed_records(streams)
        sent = Sent(records, 0.0, 0.0, "", None, streams, None)
        points.append(make_point(at_setting(scenario, setting), Measured(setting, None, ((sent,),))))
    return points


def closed(**sweep: Any) -> Scenario:
    data = {
        "arrivals": {"kind": "closed", "concurrency": 1}, "prompts": {"kind": "synthetic", "tokens": 10},
        "duration_s": 64, "sweep": sweep,
    }  # fmt: skip
    return parse_scenario(data, "test")


def test_a_sweep_of_concurrencies_names_the_places_of_the_server() -> None:
    scenario = closed(concurrency=[32, 1, 2, 4, 16, 8, 64])
    points = swept(scenario)
    assert [point.setting for point in points] == [{"concurrency": float(one)} for one in POWERS]
    (knee,) = knees_of(scenario, points)
    assert (knee.along, knee.measure, knee.value, knee.low, knee.high) == (
        "concurrency", "output_tokens_per_s", 8, 8, 8,
    )  # fmt: skip
    assert knee_text(knee) == "knee along concurrency: 8 [8], by output tokens/s"


def test_each_length_of_a_grid_has_a_knee_of_its_own() -> None:
    scenario = closed(concurrency=[1, 4, 8, 16, 32], prompt_tokens=[10, 20])
    knees = knees_of(scenario, swept(scenario))
    assert [(knee.at, knee.value) for knee in knees] == [
        ({"prompt_tokens": 10}, 8),
        ({"prompt_tokens": 20}, 8),
    ]
    assert knee_text(knees[0]).startswith("knee along concurrency at prompt tokens 10: 8")


def test_a_sweep_that_ends_too_early_says_so() -> None:
    scenario = closed(concurrency=[1, 2, 4])
    (knee,) = knees_of(scenario, swept(scenario))
    assert (knee.value, knee.because) == (None, NO_KNEE)
    assert knee_text(knee) == f"no knee along concurrency: {NO_KNEE}"


@pytest.mark.parametrize("measure", ["output_tokens_per_s", "total_tokens_per_s", "requests_per_s"])
def test_slices_have_the_mean_of_the_whole_window(measure: str) -> None:
    records = closed_records(4)
    run = Run(records, Interval(2.0, 50.0), closed=True)
    whole = {"output_tokens_per_s": 16, "total_tokens_per_s": 56, "requests_per_s": 4}[measure]
    assert throughput_of_slices(run, measure).mean() == pytest.approx(whole, rel=0.03)


def test_points_that_are_not_believed_name_no_knee() -> None:
    scenario = closed(concurrency=[1, 2, 4, 8, 16])
    points = [replace(point, valid=point.setting["concurrency"] < 4) for point in swept(scenario)]
    (knee,) = knees_of(scenario, points)
    assert knee.because == f"{FEW}; 3 of 5 were not valid or never steady"


def test_a_run_that_is_no_sweep_has_no_knee() -> None:
    scenario = closed(concurrency=[1, 2, 4]).model_copy(update={"sweep": None})
    assert knees_of(scenario, []) == ()
