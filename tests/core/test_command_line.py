"""What the command line does not understand is named in one line, with what to write; paths are one type."""

import argparse
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from lowbit_core.cli import COMMAND_GROUP, file_path, load_command, main
from lowbit_core.names import nearest


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("quantize -m X --recipe awq --out o", ["'-m' is not understood", "did you mean --model X?"]),
        ("quantize --model=X -o o --recipe awq", ["'-o' is not understood", "did you mean --out o?"]),
        ("quantize X --recipe awq --out o", ["'X' is not understood", "did you mean --model X?"]),
        (
            "quantize --modle=X --recipe awq --out o",
            ["'--modle=X' is not understood", "did you mean --model X?"],
        ),
        ("quantize --model X", ["required: --recipe"]),
        ("quantize --model X --recipe", ["--recipe: expected one argument"]),
        (
            "quantize --model X --recipe awq --device cudaa",
            ["'cudaa' is unknown; did you mean cuda? allowed are"],
        ),
        ("--model X quantize --recipe awq", ["--model stands before the command", "lowbit quantize --model"]),
        ("--modle", ["'--modle' is not understood"]),
        ("serve --model X", ["'--model' is not understood", "DIR is given without a flag: lowbit serve DIR"]),
        (
            "inspect --model X",
            ["'--model' is not understood", "DIR is given without a flag: lowbit inspect DIR"],
        ),
        ("compare a.json", ["required: B;"]),
        ("version", ["unknown command 'version'; did you mean lowbit --version?"]),
        ("help", ["unknown command 'help'; did you mean lowbit --help?"]),
        ("help quantize", ["did you mean lowbit quantize --help?"]),
        ("quantise", ["unknown command 'quantise'; did you mean quantize?"]),
        ("evaluate X --tasks hellaswg", ["unknown task 'hellaswg'; did you mean hellaswag?"]),
        ("loadtest --target http://h --timeout-s x", ["invalid positive value: 'x'"]),
        ("loadtest --target http://h --scenario chta", ["did you mean chat?"]),
        ("quantize --model X --recipe AWQ-INT4 --out o", ["did you mean awq?"]),
    ],
)
def test_what_is_not_understood_is_named_in_one_line_with_what_to_write(
    line: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    for word in words:
        assert word in captured.err


class Types(argparse.ArgumentParser):
    """Notes what a command declares."""

    def flags(self) -> dict[str, object]:
        return {(action.option_strings or [action.dest])[0]: action.type for action in self._actions}


def test_no_command_declares_a_path_by_another_type_than_the_one_that_expands_a_tilde() -> None:
    declared = {}
    for entry in entry_points(group=COMMAND_GROUP):
        parser = Types()
        load_command(entry).add_arguments(parser)
        declared[entry.name] = parser.flags()
    assert all(kind is not Path for flags in declared.values() for kind in flags.values())
    for name, flag in (
        ("quantize", "--out"), ("quantize", "--experts-report"), ("export", "--out"), ("inspect", "checkpoint"),
        ("inspect", "--html"), ("evaluate", "--items"), ("evaluate", "--json"), ("serve", "directory"),
        ("loadtest", "--records"), ("compare", "a"), ("frontier", "plan"),
    ):  # fmt: skip
        assert declared[name][flag] is file_path


def test_a_tilde_is_expanded_after_an_equals_sign_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["inspect", "~/nothing"]) == 2
    assert main(["quantize", "--model", "X", "--recipe=~/none.yaml", "--out=~/out"]) == 2
    assert main(["evaluate", "X", "--items=~/none.jsonl"]) == 2
    assert main(["compare", "~/a.json", "~/b.json"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 4
    assert all(str(tmp_path) in line for line in lines)
    assert file_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("AWQ", "awq"), ("awqq", "awq"), ("awq-int4", "awq"), ("gtpq", "gptq"), ("w4_a16", "W4A16"),
        ("fp8 block", "FP8_BLOCK"), ("bits", None), ("x", None), ("", None),
    ],
)  # fmt: skip
def test_a_near_name_is_found_whatever_its_case_and_dashes(given: str, near: str | None) -> None:
    assert nearest(given, ["awq", "awq-g64", "gptq", "W4A16", "FP8_BLOCK"]) == near
