"""`lowbit serve` as a process of the frontier: what does not start is an error with the server's own words."""

import subprocess
import sys
from pathlib import Path

import pytest

from lowbit_core.errors import EngineError, LowbitError
from lowbit_loadtest.frontier.processes import quantize, serving


def test_a_server_that_refuses_its_directory_is_an_error_with_its_reason(tmp_path: Path) -> None:
    log = tmp_path / "serve.log"
    with (
        pytest.raises(EngineError, match=r"ended with status 2: .*nothing-here"),
        serving(tmp_path / "nothing-here", (), log, 120.0),
    ):
        pytest.fail("it cannot be ready")


def test_a_recipe_that_fails_is_an_error_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=r"recipe no-such-recipe ended with status 2: .*no-such-recipe"):
        quantize(str(tmp_path), "no-such-recipe", tmp_path / "out", tmp_path / "quantize.log")


def test_a_checkpoint_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    (tmp_path / "lowbit.json").write_text("{}")
    quantize("model", "recipe", tmp_path, tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_the_frontier_command_refuses_a_plan_that_is_not_there() -> None:
    code = "import sys; from lowbit_core.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "frontier", "nowhere.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "plan file nowhere.yaml does not exist" in done.stderr
