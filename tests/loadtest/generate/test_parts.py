"""Parts of a plan: together they are the plan, whatever their number; joined they are one result, or refused."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.loadtest.conftest import FakeServer, jobs
from tests.loadtest.fake_openai import Reply
from tests.loadtest.test_cli import lowbit_loadtest

from lowbit_core.errors import ConfigError
from lowbit_loadtest.generate.driver import Share
from lowbit_loadtest.generate.http.target import Target
from lowbit_loadtest.generate.part import Part, digest, own_part, parse_part
from lowbit_loadtest.generate.planner import make_schedule
from lowbit_loadtest.generate.records import Outcome, RequestRecord
from lowbit_loadtest.generate.schedule import Schedule
from lowbit_loadtest.generate.tokens import WordTokens
from lowbit_loadtest.generate.workers import run_workers
from lowbit_loadtest.measured import MOST_APART_S, Measured, Sent, make_point
from lowbit_loadtest.parts.file import part_section, read_part
from lowbit_loadtest.runner import PAUSE_S, Starts
from lowbit_loadtest.scenario import Scenario, parse_scenario

Start = Callable[..., str]
OPEN = {
    "arrivals": {"kind": "poisson", "rate_rps": 5},
    "prompts": {"kind": "synthetic", "tokens": 9},
    "requests": 23,
}
CLOSED = {**OPEN, "arrivals": {"kind": "closed", "concurrency": 7}}
SESSIONS = {**OPEN, "prompts": {"kind": "agentic", "steps": 3, "task_tokens": 5, "result_tokens": 4}}


def scenario(**data: Any) -> Scenario:
    return parse_scenario({**OPEN, **data}, "test")


def planned(**data: Any) -> Schedule:
    return asyncio.run(make_schedule(scenario(**data), WordTokens()))


@pytest.mark.parametrize("data", [OPEN, SESSIONS])
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 23])
def test_open_parts_together_are_the_whole_plan_whatever_their_number(
    data: dict[str, Any], parts: int
) -> None:
    whole = planned(**data)
    dealt = [own_part(whole, Part(number, parts)) for number in range(1, parts + 1)]
    jobs = [job for one in dealt for job in one.jobs]
    assert sorted(jobs, key=lambda job: job.index) == list(whole.jobs)
    assert sum(one.requests or 0 for one in dealt) == whole.requests


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_closed_parts_share_the_streams_and_take_each_job_once(parts: int) -> None:
    whole = planned(**CLOSED)
    dealt = [own_part(whole, Part(number, parts)) for number in range(1, parts + 1)]
    assert sum(one.concurrency or 0 for one in dealt) == 7
    numbers = [number for one in dealt for number in range(23)[one.first :: one.step]]
    assert sorted(numbers) == list(range(23))
    assert sum(one.requests or 0 for one in dealt) == 23


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (OPEN, "--part 1/24: the plan has 23 arrivals; give at most 23 parts"),
        (CLOSED, "the plan has 7 streams"),
    ],
)
def test_more_parts_than_there_is_to_send_are_refused(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        own_part(planned(**data), Part(1, 24))


def test_the_digest_differs_with_whatever_is_sent_and_with_nothing_else() -> None:
    first = digest(planned())
    assert digest(planned(generator={"workers": 3}, slo={"ttft_s": 1})) == first
    for change in (
        {"seed": 1}, {"requests": 22}, {"arrivals": {"kind": "poisson", "rate_rps": 6}}, {"output": {"tokens": 5}},
        {"prompts": {"kind": "synthetic", "tokens": 8}}, {"warm_up": {"requests": 2}},
    ):  # fmt: skip
        assert digest(planned(**change)) != first, change


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "-1/2", "1/2/3", "a/b", "1/2 ", "1/99999"])
def test_a_part_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"give I/N with I from 1 to N, such as 1/4"):
        parse_part(text)
    assert parse_part("2/3") == Part(2, 3)


def sent(records: tuple[RequestRecord, ...], **changes: Any) -> Sent:
    fields: dict[str, Any] = {
        "start_s": 100.0, "started_unix_s": 5.0, "plan": "p", "planned": len(records), "concurrency": None,
        "length_s": None,
    }  # fmt: skip
    return Sent(records, **{**fields, **changes})


def record(index: int, at_s: float, **changes: Any) -> RequestRecord:
    """Due at `at_s`, two tokens half a second and a second later."""
    fields: dict[str, Any] = {
        "outcome": Outcome.COMPLETED, "sent_s": at_s, "ended_s": at_s + 1, "chunk_times_s": (at_s + 0.5, at_s + 1),
        "finished_s": at_s + 1, "finish_reason": "stop", "prompt_tokens": 5, "output_tokens": 2, "intended_s": at_s,
        "index": index,
    }  # fmt: skip
    return RequestRecord(**{**fields, **changes})


def test_a_parts_file_gives_back_every_request_on_its_own_clock() -> None:
    records = (record(0, 100.25, cached_tokens=3, turn=1, turns=2), record(2, 101.5, chunk_tokens=(1, 1)))
    measured = Measured(
        {"rate_rps": 2.0},
        2.0,
        ((sent(records, heartbeat_lags_s=(0.001,), samples=({"a": 1.0},), sample_times_s=(99.5,)),),),
    )
    section = json.loads(json.dumps(part_section(Part(1, 2), (measured,))))
    part, (read,) = read_part(section, "part a.json")
    assert part == Part(1, 2)
    ((back,),) = read.repetitions
    assert back.records == (
        record(0, 0.25, cached_tokens=3, turn=1, turns=2), record(2, 1.5, chunk_tokens=(1, 1)),
    )  # fmt: skip
    assert (back.heartbeat_lags_s, back.plan, back.planned) == ((0.001,), "p", 2)
    assert (back.samples, back.sample_times_s) == (({"a": 1.0},), (-0.5,))
    with pytest.raises(ConfigError, match=r"part a.json: its section part is not this version's \(KeyError"):
        read_part({**section, "points": [{}]}, "part a.json")


def test_joined_closed_loops_are_steady_while_every_part_is() -> None:
    """Two streams each; the second part runs out first: what the first does alone is not in the window."""
    long = tuple(record(index, float(index // 2)) for index in range(0, 12))
    short = tuple(record(index, float(index // 2)) for index in range(0, 8))
    parts = (sent(long, start_s=0.0, concurrency=2), sent(short, start_s=0.0, concurrency=2))
    point = make_point(parse_scenario(CLOSED, "test"), Measured({}, None, (parts,)))
    (run,) = point.runs
    assert run.window is not None
    assert (run.window.start_s, run.window.end_s) == (0.0, 4.0)
    assert point.summary.requests_per_s == pytest.approx(4)


def test_joined_parts_see_the_servers_counters_from_before_the_first_to_after_the_last() -> None:
    """The second part's last sample is the last of all: only it has all four tokens of both."""
    first = sent(
        (record(0, 0.0),), start_s=0.0, samples=({"generation_tokens": 10.0}, {"generation_tokens": 12.0})
    )
    second = sent(
        (record(1, 0.1),), start_s=5.0, samples=({"generation_tokens": 11.0}, {"generation_tokens": 14.0})
    )
    parts = (replace(first, sample_times_s=(-0.1, 1.0)), replace(second, sample_times_s=(5.0, 6.2)))
    (check,) = make_point(scenario(), Measured({}, 5.0, (parts,))).usage
    assert (check.usage_tokens, check.counter_tokens, check.agrees) == (4, 4, True)


@pytest.mark.parametrize(("apart_s", "valid"), [(0.4, True), (1.5, False)])
def test_parts_that_start_apart_did_not_send_one_load(apart_s: float, valid: bool) -> None:
    parts = (sent((record(0, 0.0),)), sent((record(1, 0.1),), started_unix_s=5.0 + apart_s))
    point = make_point(scenario(), Measured({}, 5.0, (parts,)))
    assert point.valid is valid
    assert [reason.startswith("the parts started 1.5 s apart") for reason in point.invalid_because] == [
        True
    ] * (not valid)


def send(folder: Path, url: str, part: str, *more: object) -> Path:
    """One part, in this process; parts that are sent one after the other are enough for what is sent."""
    yaml, file = folder / "plan.yaml", folder / f"part-{part.replace('/', '-of-')}.json"
    yaml.write_text(json.dumps({**OPEN, "arrivals": {"kind": "poisson", "rate_rps": 80}}))
    arguments = (
        "--scenario",
        yaml,
        "--seed",
        3,
        "--set",
        "generator.max_lag_s=5",
        "--part",
        part,
        "--json",
        file,
    )
    assert lowbit_loadtest("--target", url, *arguments, *more) == 0
    return file


def planned_times(document: dict[str, Any]) -> list[tuple[int, float]]:
    table = document["points"][0]["request_table"]
    index, due = table["columns"].index("index"), table["columns"].index("due_s")
    return [(row[index], row[due]) for row in table["rows"]]


def test_two_parts_joined_have_the_send_times_and_the_counts_of_one(
    timed_server: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = timed_server(Reply(ttft_s=0.01, gap_s=0.005, chunks=3))
    one, first = (send(tmp_path, url, part) for part in ("1/1", "1/2"))
    time.sleep(MOST_APART_S + 0.1)
    halves = [first, send(tmp_path, url, "2/2")]
    out = tmp_path / "joined.json"
    status = lowbit_loadtest("merge", *halves, "--out", out)
    joined, alone = json.loads(out.read_text()), json.loads(one.read_text())
    assert status == 1  # sent one after the other, they are no one load, and it says so
    assert "the parts started" in joined["invalid_because"][0]
    assert joined["outcomes"] == alone["outcomes"]
    assert joined["output_tokens"] == alone["output_tokens"] == 69
    assert joined["request"] == alone["request"]
    for (index, due_s), (other, other_s) in zip(planned_times(alone), planned_times(joined), strict=True):
        assert index == other
        assert due_s == pytest.approx(other_s, abs=3e-6)  # times are written in microseconds
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["joined"]["parts"] == 2
    assert lowbit_loadtest("merge", one) == 0  # one part is a plan too
    _assert_that_parts_of_other_plans_are_refused(tmp_path, halves, one)


def _assert_that_parts_of_other_plans_are_refused(tmp_path: Path, halves: list[Path], one: Path) -> None:
    def changed(name: str, change: Callable[[dict[str, Any]], object]) -> Path:
        document = json.loads(halves[1].read_text())
        change(document)
        file = tmp_path / name
        file.write_text(json.dumps(document))
        return file

    refusals: dict[tuple[Path, ...], str] = {
        (halves[0],): "missing: part 2/2; give all 2 files",
        (halves[0], halves[0]): "part 1/2 is given more than once",
        (one, halves[1]): "is part 1/1 and .* is part 2/2; give the parts of one plan",
        (halves[0], changed("seed", lambda one: one["scenario"].update(seed=4))): "plan: seed is 3 and 4",
        (
            halves[0],
            changed("slo", lambda one: one["scenario"]["slo"].update(ttft_s=1)),
        ): "slo.ttft_s is null and 1",
        (
            halves[0],
            changed("door", lambda one: one["request"].update(lenient=True)),
        ): "lenient is false and true",
        (halves[0], changed("model", lambda one: one.update(model="b"))): "models are fake-model and b",
        (
            halves[0],
            changed(
                "plan", lambda one: one["part"]["points"][0]["repetitions"][0].update(plan="other words")
            ),
        ): "are not of one plan: the requests differ",
        (halves[0], changed("cut", lambda one: one["part"]["points"].clear())): "or one was interrupted",
        (
            changed("whole", lambda one: one.pop("part")),
        ): "was sent as a whole; only runs with --part I/N are joined",
        (tmp_path / "plan.yaml",): "is no result of lowbit loadtest",
        (tmp_path / "nowhere.json",): "cannot be read",
        (): "give the files of all parts",
    }
    for files, words in refusals.items():
        with pytest.raises(ConfigError, match=words):
            lowbit_loadtest("merge", *files, "--out", tmp_path / "refused.json")
    assert not (tmp_path / "refused.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scenario", "chat", "--part", "1/2"), "--part 1/2 needs --json"),
        (
            ("--scenario", "saturation", "--part", "1/2"),
            "a search or a ramp chooses its rates by what it sees",
        ),
        (("--scenario", "highest-rate", "--part", "1/2"), r"give sweep: \{rate_rps"),
        (
            ("--scenario", "quick", "--set", "quality={}", "--part", "1/2"),
            "quality is asked from one machine",
        ),
    ],
)
def test_what_parts_cannot_do_is_refused_before_anything_is_sent(
    tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    out = () if "needs --json" in message else ("--json", tmp_path / "a.json")
    with pytest.raises(ConfigError, match=message):
        lowbit_loadtest("--target", "http://127.0.0.1:9", *arguments, *out)


def test_a_start_that_is_over_is_refused(fake_server: FakeServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--start-at is over since \d+ s; give a later moment"):
        send(tmp_path, fake_server.url, "1/1", "--start-at", "2026-01-31T12:00:00Z")
    with pytest.raises(SystemExit):
        send(tmp_path, fake_server.url, "1/1", "--start-at", "noon")
    assert fake_server.bodies == []


def test_runs_of_a_planned_start_follow_at_times_that_every_part_knows() -> None:
    start_s = time.time() + 1000
    starts = Starts(start_s)
    lasting = planned(requests=None, duration_s=20)
    taken = [starts.take(lasting, is_last) for is_last in (False, False, True)]
    assert taken == [start_s, start_s + 20 + PAUSE_S, start_s + 2 * (20 + PAUSE_S)]
    with pytest.raises(ConfigError, match="give duration_s instead of requests"):
        Starts(start_s).take(planned(**CLOSED), is_last=False)
    assert Starts(None).take(planned(**CLOSED), is_last=False) is None


def test_workers_start_at_the_given_moment(timed_server: Start) -> None:
    url = timed_server(Reply(ttft_s=0.01, gap_s=0.005, chunks=1))
    start_at_s = time.time() + 4
    ran = run_workers(
        [Share(Target(url, "fake-model"), jobs(1, at_s=[0.1]))], lambda _: None, start_at_s=start_at_s
    )
    assert ran.started_unix_s == pytest.approx(start_at_s, abs=0.05)
    assert ran.records[0].intended_s == ran.start_s + 0.1
