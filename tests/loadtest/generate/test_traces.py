"""Recordings of every format: what is read, how it is played, and what is refused with its line and column."""

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowbit_core.errors import ConfigError
from lowbit_loadtest.generate.planner import make_schedule
from lowbit_loadtest.generate.replay import Played, play
from lowbit_loadtest.generate.schedule import Recording, Schedule
from lowbit_loadtest.generate.tokens import WordTokens
from lowbit_loadtest.generate.traces.read import FORMATS, read_recording
from lowbit_loadtest.scenario import parse_scenario
from lowbit_loadtest.sections.arrivals import Replay

AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,48,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:06.9799600,110,27
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:00+00:00,2399,6
2024-05-10 02:00:01.5+02:00,1,0
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.5,GPT-4,300,0,300,API log
118,ChatGPT,0,20,20,Conversation log
"""
BURSTGPT_3 = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,abc,1.5,ChatGPT,472,18,490,Conversation log
"""
MOONCAKE = """{"timestamp": 0, "input_length": 1030, "output_length": 500, "hash_ids": [0, 1, 2]}
{"timestamp": 27000, "input_length": 1100, "output_length": 4, "hash_ids": [0, 1, 3]}
"""
BAILIAN = """{"chat_id": 1, "timestamp": 61.5, "input_length": 40, "output_length": 3, "hash_ids":[7,8,9]}
{"chat_id": 2, "turn": 2, "timestamp": 62.5, "input_length": 50, "output_length": 4, "hash_ids":[7,8,1,2]}
"""
TABLES = {"azure": AZURE_2023, "burstgpt": BURSTGPT}


def written(folder: Path, text: str | bytes, name: str = "trace") -> Path:
    file = folder / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def played(file: Path, **keys: Any) -> Played:
    return play(Replay(kind="replay", path=str(file), **keys))


def schedule(file: Path, as_prompts: bool = False, **data: Any) -> Schedule:
    arrivals = {"kind": "replay", "path": str(file)}
    prompts = {"kind": "file", "path": str(file), **data.pop("prompts", {})}
    asked = {"arrivals": {"kind": "constant", "rate_rps": 1}, "prompts": prompts}
    scenario = parse_scenario({**(asked if as_prompts else {"arrivals": arrivals}), **data}, "test")
    return asyncio.run(make_schedule(scenario, WordTokens()))


def lengths(one: Played) -> list[tuple[int | None, int | None]]:
    return [(turn.prompt_tokens, turn.output_tokens) for session in one.sessions for turn in session.turns]


def test_azure_2023_is_played_with_speed_and_limits_and_what_was_cut_is_counted(tmp_path: Path) -> None:
    file = written(tmp_path, AZURE_2023)
    one = played(file, speed=2, max_prompt_tokens=1000)
    assert one.times_s == pytest.approx([0, 0.026, 1.5], abs=1e-6)
    assert lengths(one) == [(48, 10), (1000, 8), (110, 27)]
    assert one.recording == Recording("azure", 3, 3, cut_to_limits=1)
    assert len(played(file, skip_s=1).sessions) == 1


def test_azure_2024_has_zones_and_whole_seconds_and_is_put_in_order(tmp_path: Path) -> None:
    one = played(written(tmp_path, AZURE_2024))
    assert one.times_s == pytest.approx([0, 0.00993, 1.5], abs=1e-6)
    assert lengths(one) == [(2399, 6), (2162, 5), (1, 0)]


def test_a_request_without_output_is_counted_and_sent_or_skipped_but_never_taken_for_another(
    tmp_path: Path,
) -> None:
    file = written(tmp_path, BURSTGPT)
    sent = played(file)
    assert lengths(sent) == [(472, 18), (300, 0), (0, 20)]
    assert sent.recording == Recording("burstgpt", 3, 3, without_prompt=1, without_output=1)
    assert [job.turns[0].max_tokens for job in schedule(file).jobs] == [18, 1, 20]
    skipped = played(file, without_output="skip")
    assert lengths(skipped) == [(472, 18), (0, 20)]
    assert skipped.times_s == [0, 113]
    assert skipped.recording == Recording("burstgpt", 3, 2, without_prompt=1, skipped=1)


def test_burstgpts_third_release_has_more_columns(tmp_path: Path) -> None:
    assert lengths(played(written(tmp_path, BURSTGPT_3))) == [(472, 18)]


def test_mooncake_shares_the_blocks_that_it_says(tmp_path: Path) -> None:
    made = schedule(written(tmp_path, MOONCAKE))
    assert [job.at_s for job in made.jobs] == [0.0, 27.0]
    assert [job.turns[0].max_tokens for job in made.jobs] == [500, 4]
    one, other = (job.turns[0].messages[0]["content"].split() for job in made.jobs)
    assert (len(one), len(other)) == (1030, 1100)
    assert one[:1024] == other[:1024]
    assert one[1024:] != other[1024:1030]


def test_bailian_is_not_mooncake_its_times_are_seconds_and_its_blocks_16_tokens(tmp_path: Path) -> None:
    file = written(tmp_path, BAILIAN)
    assert read_recording(file, "trace")[0] == "bailian"
    made = schedule(file)
    assert [job.at_s for job in made.jobs] == [0.0, 1.0]
    one, other = (job.turns[0].messages[0]["content"].split() for job in made.jobs)
    assert (len(one), len(other)) == (40, 50)
    assert one[:32] == other[:32]
    assert one[32:40] != other[32:40]


@pytest.mark.parametrize("text", [AZURE_2023, AZURE_2024, BURSTGPT, BURSTGPT_3, MOONCAKE, BAILIAN])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n"])
def test_marks_encodings_and_line_ends_change_nothing(
    tmp_path: Path, text: str, encoding: str, newline: str
) -> None:
    plain = read_recording(written(tmp_path, text), "trace")
    other = text.replace("\n", newline).encode(encoding)
    assert read_recording(written(tmp_path, other, "other"), "trace") == plain
    assert read_recording(written(tmp_path, gzip.compress(other), "other.gz"), "trace") == plain


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_tables_of_spreadsheets_in_other_languages_are_read(
    tmp_path: Path, name: str, delimiter: str
) -> None:
    text = TABLES[name]
    other = text.replace(",", delimiter).replace("Tokens", "TOKENS")
    found = read_recording(written(tmp_path, other, "other"), "trace")
    assert found == read_recording(written(tmp_path, text), "trace")
    quoted = "\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in text.splitlines())
    assert read_recording(written(tmp_path, quoted, "quoted"), "trace") == found


SHAREGPT = [
    {"id": "a", "conversations": [
        {"from": "gpt", "value": "Hello!"}, {"from": "human", "value": "one two"}, {"from": "gpt", "value": "a b c"},
        {"from": "human", "value": "three"}, {"from": "gpt", "value": "d"}, {"from": "human", "value": "cut off"},
    ]},
    {"id": "b", "conversations": []},
    {"id": "c", "conversations": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y z"}]},
]  # fmt: skip


@pytest.mark.parametrize("lines", [False, True])
def test_sharegpt_is_asked_turn_by_turn_with_answers_as_long_as_recorded(tmp_path: Path, lines: bool) -> None:
    text = "\n".join(map(json.dumps, SHAREGPT)) if lines else json.dumps(SHAREGPT, indent=1)
    made = schedule(written(tmp_path, text), as_prompts=True, requests=3, prompts={"think_s": 2})
    asked = [[turn.messages[-1]["content"] for turn in job.turns] for job in made.jobs]
    assert asked == [["one two", "three"], ["x"], ["one two", "three"]]
    assert [[turn.max_tokens for turn in job.turns] for job in made.jobs] == [[3, 1], [2], [3, 1]]
    assert [turn.pause_s for turn in made.jobs[0].turns] == [0, 2]
    assert made.recording == Recording("sharegpt", 2, 3)
    limited = schedule(tmp_path / "trace", as_prompts=True, requests=1, output={"tokens": 9, "exact": True})
    assert [turn.max_tokens for turn in limited.jobs[0].turns] == [9, 9]


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
AGENT: dict[str, Any] = {
    "at_s": 3.5,
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Weather?"}, {"type": "image_url", "image_url": {}}],
        },
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain", "tool_s": 1.25},
        {"role": "assistant", "content": "It rains in Bern."},
        {"role": "user", "content": "Thanks", "think_s": 4},
        {"role": "assistant", "content": "Welcome."},
    ],
}


def test_a_recorded_agent_is_asked_again_with_parts_tools_calls_and_pauses(tmp_path: Path) -> None:
    made = schedule(written(tmp_path, json.dumps(AGENT)))
    (job,) = made.jobs
    first, second, third = job.turns
    assert job.tools == tuple(AGENT["tools"])
    assert [message["role"] for message in first.messages] == ["system", "user"]
    assert first.messages[1]["content"][0] == {"type": "text", "text": "Weather?"}
    assert first.answer == {"content": None, "tool_calls": [CALL]}  # the result refers to it
    assert second.messages == ({"role": "tool", "tool_call_id": "c1", "content": "rain"},)
    assert second.answer is None  # the server's own answer is carried
    assert [turn.pause_s for turn in job.turns] == [0, 1.25, 4]
    assert (second.max_tokens, third.max_tokens) == (4, 1)


def test_a_faster_replay_has_shorter_pauses(tmp_path: Path) -> None:
    (session,) = played(written(tmp_path, json.dumps(AGENT)), speed=2).sessions
    assert [turn.pause_s for turn in session.turns] == [None, 0.625, 2]


def test_messages_that_end_with_a_question_are_one_request_with_its_history(tmp_path: Path) -> None:
    messages: list[dict[str, str]] = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
    ]  # fmt: skip
    made = schedule(written(tmp_path, json.dumps({"messages": messages})), as_prompts=True, requests=1)
    assert [turn.messages for turn in made.jobs[0].turns] == [tuple(messages)]
    assert made.jobs[0].turns[0].max_tokens == 128


def test_lines_of_ours_have_lengths_texts_and_times(tmp_path: Path) -> None:
    rows = [
        {"prompt_tokens": 7, "output_tokens": 0, "at_s": 2},
        {"prompt": "hello", "at_s": 1, "output_tokens": 5},
        {"turns": ["a", "b"], "at_s": 4},
    ]
    made = schedule(written(tmp_path, "\n".join(map(json.dumps, rows))))
    assert [job.at_s for job in made.jobs] == [0, 1, 3]
    assert [[turn.max_tokens for turn in job.turns] for job in made.jobs] == [[5], [1], [128, 128]]
    assert made.recording == Recording("lowbit", 3, 3, without_output=1)


def test_openai_leaves_out_what_a_data_set_carries_beside_its_messages(tmp_path: Path) -> None:
    file = written(tmp_path, json.dumps({"messages": AGENT["messages"], "source": "x"}))
    with pytest.raises(ConfigError, match=r"line 1: unknown key 'source'.*format: openai leaves others out"):
        read_recording(file, "prompts")
    assert len(read_recording(file, "prompts", "openai")[1][0].turns) == 3


def azure(row: str) -> str:
    return AZURE_2023 + row


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            azure("yesterday,1,2\n"),
            "line 5, column TIMESTAMP: 'yesterday' is given; allowed is a date and time",
        ),
        (
            azure("2023-11-16 18:17:08,x,2\n"),
            "line 5, column ContextTokens: 'x' is given; allowed is a whole number",
        ),
        (azure("2023-11-16 18:17:08,1,-2\n"), "line 5, column GeneratedTokens: '-2' is given"),
        (azure("2023-11-16 18:17:08,1.5,2\n"), "line 5, column ContextTokens: '1.5' is given"),
        (azure("2023-11-16 18:17:08,,2\n"), "line 5, column ContextTokens: nothing is given"),
        (
            azure("2023-11-16 18:17:08,99999999999,2\n"),
            "line 5, column ContextTokens: '99999999999' is given",
        ),
        (azure("2023-11-16 18:17:08,1\n"), "line 5: 2 columns, where the header has 3"),
        ("\r\n \n" + azure("2023-11-16 18:17:08,1,x\n"), "line 7, column GeneratedTokens: 'x' is given"),
        (azure('2023-11-16 18:17:08,"1,2\n'), "line 5"),
        (
            "time,tokens\n1,2\n",
            r"no format that is known: its first columns are 'time, tokens'; known by: azure",
        ),
        ("Timestamp,Request tokens,Response tokens\nnan,1,2\n", "line 2, column Timestamp: 'nan' is given"),
        ("", "has no line"),
        (MOONCAKE + '{"timestamp": 1', r"line 3: not JSON: .*character"),
        (MOONCAKE.replace("1100", "true"), "line 2, key input_length: 'True' is given"),
        (MOONCAKE.replace("1100", "1e400"), "line 2, key input_length: 'inf' is given"),
        (MOONCAKE.replace("[0, 1, 3]", '["a"]'), "line 2, key hash_ids: "),
        (
            '[{"conversations": [{"from": "robot", "value": "a"}]}]',
            r"item 1, key conversations\.0\.from: 'robot'",
        ),
        ('[{"conversations": [{"from": "human"}]}]', r"item 1, key conversations\.0\.value: allowed is text"),
        (
            '[{"conversations": [{"from": [1], "value": "a"}]}]',
            r"key conversations\.0\.from: '\[1\]' is given",
        ),
        (
            MOONCAKE.replace("27000", "1e300"),
            "line 2, key timestamp: '1e\\+300' is given; allowed is a number up to",
        ),
        ("[3]", "item 1: not an object: '3'"),
        ('{"messages": []}', "line 1, key messages: allowed is a list of one or more messages"),
        (
            '{"messages": [{"role": "user", "content": [1]}]}',
            r"key messages\.0\.content\.0: allowed is a part",
        ),
        ('{"messages": [{"role": "user", "content": null}]}', r"key messages\.0\.content: allowed is text"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', r"key messages\.0\.tool_call_id"),
        (
            '{"messages": [{"role": "user", "content": "a", "think_s": -1}]}',
            r"key messages\.0\.think_s: -1 is given; allowed is a number of seconds",
        ),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": 3}', "key tools: allowed is a list"),
        (
            '{"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]}',
            "key tools: allowed is a list",
        ),
        ('{"prompt": ["a"]}', "key prompt: allowed is text, not empty"),
    ],
)
def test_a_wrong_row_is_refused_with_its_line_and_its_column_or_key(
    tmp_path: Path, text: str, message: str
) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as raised:
        read_recording(file, "trace")
    assert "\n" not in str(raised.value)
    assert str(file) in str(raised.value)


def test_a_format_that_the_file_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not what mooncake has: .*known by: mooncake \(timestamp"):
        read_recording(written(tmp_path, AZURE_2023), "trace", "mooncake")


def test_texts_without_times_are_prompts_and_no_trace(tmp_path: Path) -> None:
    file = written(tmp_path, json.dumps(SHAREGPT))
    with pytest.raises(ConfigError, match=r"\(sharegpt\) has no time to replay; give it as prompts"):
        played(file)
    with pytest.raises(ConfigError, match="has texts, which max_prompt_tokens cannot cut"):
        played(written(tmp_path, json.dumps(AGENT)), max_prompt_tokens=4)
    with pytest.raises(ConfigError, match="no request after skip_s = 99"):
        played(written(tmp_path, AZURE_2023), skip_s=99)


def test_lengths_of_a_trace_may_come_at_other_times(tmp_path: Path) -> None:
    made = schedule(written(tmp_path, AZURE_2023), as_prompts=True, requests=4)
    assert [job.at_s for job in made.jobs] == [0, 1, 2, 3]
    assert [job.turns[0].max_tokens for job in made.jobs] == [10, 8, 27, 10]
    assert [len(job.turns[0].messages[0]["content"].split()) for job in made.jobs] == [48, 3180, 110, 48]


def test_every_format_can_be_asked_for_by_its_name() -> None:
    assert {one.name for one in FORMATS} == {
        "azure", "bailian", "burstgpt", "mooncake", "sharegpt", "openai", "lowbit",
    }  # fmt: skip


KEYS = st.sampled_from(
    sorted({key for one in FORMATS for key in one.keys} | {"tools", "at_s", "hash_ids", "role"})
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | KEYS, inner, max_size=4)
    ),
    max_leaves=8,
)
HEADERS = st.sampled_from([one.splitlines()[0] for one in (AZURE_2023, BURSTGPT, BURSTGPT_3)])
TABLE = st.builds(
    lambda head, rows: "\n".join([head, *rows]), HEADERS, st.lists(st.text(max_size=30), max_size=3)
)
ROWS = st.lists(st.dictionaries(KEYS, VALUES, max_size=5), min_size=1, max_size=3)
JSON_LINES = st.builds(lambda rows: "\n".join(map(json.dumps, rows)), ROWS)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TABLE | JSON_LINES | st.builds(json.dumps, ROWS) | st.text() | st.binary())
def test_whatever_a_file_holds_it_is_read_or_refused_in_one_line(
    tmp_path: Path, content: str | bytes
) -> None:
    raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    file = written(tmp_path, raw)
    try:
        _, sessions = read_recording(file, "trace")
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert str(file) in str(error)  # noqa: PT017
    else:
        for turn in (turn for session in sessions for turn in session.turns):
            assert turn.messages or turn.prompt_tokens is not None
