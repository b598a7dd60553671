"""The command `lowbit loadtest`: flags, exit status, and what goes to stdout."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lowbit_core.errors import ConfigError
from lowbit_loadtest.cli import command

if TYPE_CHECKING:
    from tests.loadtest.conftest import FakeServer


def lowbit_loadtest(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_result_is_the_last_line_of_stdout_and_the_file(
    fake_server: "FakeServer", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    arguments = (
        "--target",
        fake_server.url,
        "--concurrency",
        2,
        "--requests",
        6,
        "--seed",
        5,
        "--json",
        file,
    )
    assert lowbit_loadtest(*arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    written = json.loads(file.read_text(encoding="utf-8"))
    assert len(written["points"][0].pop("request_table")["rows"]) == 6
    assert result == written
    assert result["outcomes"] == {"completed": 6, "rejected": 0, "failed": 0, "cut_off": 0, "timed_out": 0}
    assert result["model"] == "fake-model"
    assert (result["scenario"]["arrivals"]["concurrency"], result["scenario"]["seed"]) == (2, 5)
    assert set(result["ttft_s"]) == {"count", "mean", "p50", "p90", "p95", "p99", "p999", "interval"}
    assert set(result["ttft_s"]["interval"]["p999"]) == {"low", "high"}


def test_one_rejected_request_makes_the_exit_status_1(fake_server: "FakeServer") -> None:
    fake_server.script(status=429)
    assert lowbit_loadtest("--target", fake_server.url, "--requests", 4) == 1


def test_prompts_file_gives_prompts_and_conversations(fake_server: "FakeServer", tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "Hi"}
    rows = [{"prompt": "one\u2028line"}, {"messages": [system, user]}]
    file.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    arguments = ("--target", fake_server.url, "--prompts", file, "--requests", 2, "--concurrency", 1)
    assert lowbit_loadtest(*arguments) == 0
    sent = [body["messages"] for body in fake_server.bodies]
    assert sent == [[{"role": "user", "content": "one\u2028line"}], [system, user]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no line"),
        ('{"prompt": "a"}\nnot json', "line 2: not JSON"),
        ('{"prompt": "a", "n": 2}', "line 1: unknown key 'n'; allowed here: prompt, messages"),
        ("{}", "no format that is known"),
        (
            '{"prompt": "a"}\n{"id": 1}',
            "line 2, key prompt: give one of prompt, messages, turns, prompt_tokens",
        ),
        (
            '{"messages": [{"role": "robot", "content": "a"}]}',
            r"line 1, key messages\.0\.role: 'robot' is given; allowed is system",
        ),
    ],
)
def test_wrong_prompts_file_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        lowbit_loadtest("--target", "http://127.0.0.1:9", "--prompts", file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--requests", 2, "--concurrency", 3), "--requests 2 is fewer than --concurrency 3"),
        (("--prompts", "/nowhere.jsonl"), "cannot be read"),
        (("--scenario", "quick", "--concurrency", 2), "--concurrency and --scenario exclude each other"),
        (("--set", "seed=1"), "give --scenario too"),
        (
            ("--scenario", "nowhere.yaml"),
            "scenario file nowhere.yaml does not exist; bundled scenarios are: agentic",
        ),
        (("--json", "/nowhere/result.json"), "--json /nowhere/result.json cannot be written"),
        ((), "does not answer"),
    ],
)
def test_wrong_input_exits_with_2(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        lowbit_loadtest("--target", "http://127.0.0.1:9", *arguments)
    assert raised.value.exit_status == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("--target", "127.0.0.1:8000"),
        ("--target", "http://127.0.0.1:eight"),
        ("--target", "http://127.0.0.1:9", "--requests", "0"),
        ("--target", "http://127.0.0.1:9", "--timeout-s", "nan"),
        ("--target", "http://127.0.0.1:9", "--temperature", "-1"),
        ("--target", "http://127.0.0.1:9", "--prompt", "a", "--prompts", "b"),
    ],
)
def test_wrong_flag_exits_with_2(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as raised:
        lowbit_loadtest(*arguments)
    assert raised.value.code == 2
