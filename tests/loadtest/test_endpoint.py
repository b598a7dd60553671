"""Items asked through an endpoint, against the stand-in that scores by rule: who serves what, and what gets lost."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.loadtest.conftest import serve_fake
from tests.loadtest.test_quality import ScoringServer

from lowbit_core.cli import main
from lowbit_core.errors import ConfigError
from lowbit_core.evals.items import Item, Request
from lowbit_loadtest.endpoint import connect


@pytest.fixture
def server() -> Iterator[ScoringServer]:
    yield from serve_fake(ScoringServer())


def items(count: int) -> list[Item]:
    """Choices whose right answer is a word that the stand-in knows, and a cloze."""
    choices = [
        Item(
            "t",
            str(n),
            "choice",
            (Request(f"question {n}", " right"), Request(f"question {n}", " wrongs")),
            0,
        )
        for n in range(count)
    ]
    return [*choices, Item("cloze", "1", "cloze", (Request("so it", " known words"),), 0)]


def test_every_item_is_answered_once(server: ScoringServer) -> None:
    asked = items(30)
    answers = list(connect(server.url, "fake-model").answers(asked))
    assert sorted(one.key for one in answers) == sorted(item.key for item in asked)
    assert all(one.acc_norm for one in answers if one.kind == "choice")


def test_what_the_server_loses_has_no_answer_and_ends_the_command_with_1(
    server: ScoringServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "own.jsonl", tmp_path / "out.json"
    rows = [{"context": f"question {n}", "choices": [" right", " wrongs"]} for n in range(10)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["evaluate", "fake-model", "--target", server.url, "--items", str(file), "--json", str(out)]
    assert main(arguments) == 0
    whole = json.loads(out.read_text())
    assert whole["tasks"]["all"]["model"]["acc_norm"]["value"] == 1
    assert (whole["target"], whole["settings"]["served"]) == (server.url, "fake-model")
    server.loses = (server.scored + 3,)  # one of them is the preflight's
    assert main(arguments) == 1
    assert "1 of 10 items got no answer" in capsys.readouterr().err
    assert json.loads(out.read_text())["tasks"]["own"]["model"]["unanswered"] == 1
    arguments += ["--base", str(tmp_path / "whole.json")]
    (tmp_path / "whole.json").write_text(json.dumps(whole))
    server.loses = ()
    assert main(arguments) == 0
    assert json.loads(out.read_text())["tasks"]["all"]["changes"]["flips"] == 0


def test_a_directory_stands_for_the_model_of_its_name(server: ScoringServer, tmp_path: Path) -> None:
    (tmp_path / "fake-model").mkdir()
    assert connect(server.url, str(tmp_path / "fake-model")).model == "fake-model"
    with pytest.raises(ConfigError, match=r"is not served at .*; served are: fake-model"):
        connect(server.url, str(tmp_path))


def test_a_server_that_cannot_score_is_refused(server: ScoringServer) -> None:
    server.refuses = "echo"
    with pytest.raises(ConfigError, match="cannot score continuations"):
        connect(server.url, "fake-model")
    with pytest.raises(ConfigError, match="does not answer"):
        connect("http://127.0.0.1:9", "fake-model")


def test_evaluate_reaches_a_server_with_the_flags_of_the_load_test(
    server: ScoringServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"context": "question", "choices": [" right", " wrongs"]}))
    asked = ["evaluate", "fake-model", "--target", f"{server.url}?tenant=a", "--items", str(file)]
    server.api_key = "secret"
    monkeypatch.delenv("LOWBIT_API_KEY", raising=False)
    assert main(asked) == 2
    assert "refuses the API key (401); set LOWBIT_API_KEY" in capsys.readouterr().err
    assert (
        main([*asked, "--header", "Authorization: Bearer secret", "--body", "echo=", "--body", "user=me"])
        == 0
    )
    monkeypatch.setenv("LOWBIT_API_KEY", "secret\n")
    assert main(asked) == 2
    assert "the key in LOWBIT_API_KEY ends with a line break" in capsys.readouterr().err


def test_flags_of_a_target_without_one_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["evaluate", "model", "--tasks", "sciq", "--insecure"]) == 2
    assert "--insecure says how --target is asked; give --target too" in capsys.readouterr().err
