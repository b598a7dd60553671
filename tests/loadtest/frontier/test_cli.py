"""`lowbit frontier` of a plan that decides: what it writes, prints and returns, and what a second call makes of it."""

import argparse
import json
from pathlib import Path

import pytest

from lowbit_loadtest.frontier_cli import run

PLAN = """
description: nothing is small enough
checkpoints: [{name: base, path: base}, {name: small, path: small}]
base: base
scenarios: [{name: load, scenario: batch}]
quality: {tasks: [], items_file: items.jsonl, probes: 0}
decide: {within: 10m}
constraints: {bytes_of_base: 0.5}
"""


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    for name, size in (("base", 1000), ("small", 900)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"\0" * size)
    (tmp_path / "items.jsonl").write_text('{"context": "2 + 2 =", "choices": [" 4", " 5"]}\n')
    (tmp_path / "plan.yaml").write_text(PLAN)
    return tmp_path / "plan.yaml"


def call(plan: Path, *overrides: str, report_only: bool = False) -> int:
    out = plan.parent / "out"
    return run(argparse.Namespace(plan=plan, set=list(overrides), out=out, report_only=report_only))


def test_what_is_known_before_a_server_starts_decides_without_one(
    plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(plan) == 1
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["recommendation"]["verdict"] == "none"
    steps = [json.loads(line) for line in (plan.parent / "out/steps.jsonl").read_text().splitlines()]
    assert [(step["kind"], step.get("checkpoint")) for step in steps] == [
        ("begin", None),
        ("out", "base"),
        ("out", "small"),
        ("end", None),
    ]
    assert steps[0]["bytes"] == {"base": 1000, "small": 900}
    table = (plan.parent / "out/frontier.md").read_text()
    assert "Nothing meets the constraints" in table
    assert "small is out after 0.0 minutes: has 0.90 of the base's bytes, above 0.5" in table


def test_a_report_of_the_same_steps_may_have_other_constraints(
    plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(plan)
    assert call(plan, "constraints.bytes_of_base=0.95", report_only=True) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["recommendation"]
    assert (found["verdict"], found["name"]) == (
        "recommended",
        "small",
    )  # alone, and nothing else is asked of it
