"""Tiny models, written once for the whole test session, and `lowbit plan` as a function."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_models import write_tiny_model

from lowbit_core.cli import Parser
from lowbit_plan.cli import command


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_model(family)` is the directory of a tiny model of that family."""
    return cache(lambda family: write_tiny_model(tmp_path_factory.mktemp(family), family))


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """`plan(*flags)` runs `lowbit plan`: its status, its JSON, and what it says to a person."""

    def run(*flags: object) -> tuple[int, dict[str, Any], str]:
        parser = Parser(prog="lowbit plan")
        command.add_arguments(parser)
        status = command.run(parser.read([str(flag) for flag in flags]))
        printed = capsys.readouterr()
        return status, json.loads(printed.out.splitlines()[-1]), printed.err

    return run
