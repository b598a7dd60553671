"""Sweeps and all requests at once: what is measured, in which order, and what is refused."""

import json
from typing import TYPE_CHECKING, Any

import pytest
from tests.loadtest.test_cli import lowbit_loadtest

from lowbit_core.errors import ConfigError
from lowbit_loadtest.rates import at_setting, settings_to_measure
from lowbit_loadtest.scenario import Scenario, load_scenario, parse_scenario

if TYPE_CHECKING:
    from tests.loadtest.conftest import FakeServer

BASE: dict[str, Any] = {
    "arrivals": {"kind": "poisson", "rate_rps": 2}, "prompts": {"kind": "synthetic", "tokens": 8}, "duration_s": 9,
}  # fmt: skip
CLOSED = {"kind": "closed", "concurrency": 4}


def scenario(**data: Any) -> Scenario:
    return parse_scenario({**BASE, **data}, "test")


def test_a_sweep_measures_every_combination_in_ascending_order() -> None:
    swept = scenario(sweep={"rate_rps": [4, 1], "output_tokens": [9, 3]}, output={"tokens": 5, "exact": True})
    settings = list(settings_to_measure(swept, []))
    assert settings == [
        {"rate_rps": 1, "output_tokens": 3}, {"rate_rps": 1, "output_tokens": 9},
        {"rate_rps": 4, "output_tokens": 3}, {"rate_rps": 4, "output_tokens": 9},
    ]  # fmt: skip
    last = at_setting(swept, settings[-1])
    assert last.arrivals.rate_rps == 4  # type: ignore[union-attr]
    assert last.output is not None
    assert last.output.tokens is not None
    assert (last.output.tokens.mean, last.output.exact) == (9, True)


def test_lengths_and_streams_are_set_where_they_are_swept() -> None:
    swept = scenario(arrivals=CLOSED, sweep={"concurrency": 8, "prompt_tokens": [16]})
    (setting,) = settings_to_measure(swept, [])
    there = at_setting(swept, setting)
    assert there.arrivals.concurrency == 8  # type: ignore[union-attr]
    assert there.prompts.tokens.mean == 16  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"sweep": {}}, "sweep = .*give one or more of concurrency, rate_rps, prompt_tokens, output_tokens"),
        ({"sweep": {"concurency": [1]}}, r"unknown key 'sweep.concurency'; did you mean concurrency\?"),
        ({"sweep": {"rate_rps": [1, 1]}}, "sweep.rate_rps = .*each value stands once"),
        ({"sweep": {"rate_rps": [0]}}, "sweep.rate_rps.0 = 0: allowed is a number above 0"),
        ({"sweep": {"concurrency": [1]}}, "sweep.concurrency needs arrivals closed"),
        (
            {"arrivals": CLOSED, "sweep": {"rate_rps": [1]}},
            "sweep.rate_rps needs arrivals poisson, gamma or constant",
        ),
        ({"arrivals": CLOSED, "sweep": {"rate_rps": [1], "concurrency": [1]}}, "give one of the two"),
        ({"prompts": {"kind": "text"}, "sweep": {"prompt_tokens": [1]}}, "needs prompts synthetic"),
        ({"sweep": {"rate_rps": list(range(1, 202))}}, "201 combinations; at most 200"),
        (
            {"sweep": {"rate_rps": [1]}, "search": {"low_rps": 1, "high_rps": 2}, "slo": {"ttft_s": 1}},
            "sweep measures what it lists; leave out search",
        ),
        (
            {"arrivals": CLOSED, "duration_s": None, "requests": 6, "sweep": {"concurrency": [2, 8]}},
            "sweep.concurrency reaches 8 with requests 6",
        ),
        ({"arrivals": {"kind": "poisson", "rate_rps": float("inf")}}, r"inf is no rate; .*\{kind: at_once\}"),
        ({"arrivals": {"kind": "constant", "rate_rps": "inf"}}, r"inf is no rate; .*\{kind: at_once\}"),
        ({"arrivals": {"kind": "at_once"}}, "at_once takes requests, and no duration_s"),
    ],
)
def test_what_cannot_be_swept_is_refused_with_its_key(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        scenario(**data)
    assert "\n" not in str(raised.value)


def test_several_concurrencies_by_flag_are_a_list_of_points_with_a_knee(
    fake_server: "FakeServer", capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--target", fake_server.url, "--concurrency", "4,1,2", "--requests", 8)
    assert lowbit_loadtest(*arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [point["setting"] for point in result["points"]] == [{"concurrency": one} for one in (1, 2, 4)]
    assert [point["requests"] for point in result["points"]] == [8, 8, 8]
    (knee,) = result["knees"]
    assert knee["along"] == "concurrency"
    assert "Kneedle (Satopää et al. 2011)" in knee["rule"]
    with pytest.raises(ConfigError, match="--requests 8 is fewer than --concurrency 16"):
        lowbit_loadtest("--target", fake_server.url, "--concurrency", "2,16", "--requests", 8)


def test_all_requests_at_once_are_in_flight_together_and_the_window_is_the_whole_run(
    fake_server: "FakeServer", capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(12):
        fake_server.script(first_chunk_delay_s=1.0)
    settings = [
        part
        for change in ("arrivals={kind: at_once}", "requests=12", "warm_up={}", "generator.max_lag_s=5")
        for part in ("--set", change)
    ]
    assert lowbit_loadtest("--target", fake_server.url, "--scenario", "quick", *settings) == 0
    assert fake_server.most_in_flight == 12
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["requests_per_s"] == pytest.approx(12 / result["duration_s"], rel=0.05)


def test_a_bundled_scenario_can_be_swept_by_set() -> None:
    swept = load_scenario("batch", ("sweep.concurrency=[1, 4, 16]",))
    assert swept.sweep is not None
    assert swept.sweep.axes == {"concurrency": (1, 4, 16)}
