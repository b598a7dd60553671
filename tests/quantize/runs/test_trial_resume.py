"""Router distillation walks twice and keeps the better result; killed anywhere, it ends with the same files."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.quantize.runs.test_resume import command, contents
from tests.quantize.stoppable import Point, renaming, run

from lowbit_core.manifest import MANIFEST_NAME, PROGRESS_NAME
from lowbit_core.manifest_files import file_sha256
from lowbit_quantize.run.directory import STATE, TRIAL_NAME
from lowbit_quantize.run.journal import TrialResult

DISTILL = ("--set", "passes=[{prune_experts: {prune_ratio: 0.5}}, distill_router, quantize]")
SHARDS = 4  # three layers and what lies outside of them


@dataclass(frozen=True)
class Straight:
    """A run that was not killed, and whether it kept the distilled routers."""

    model: Path
    out: Path
    kept: bool


@pytest.fixture(scope="module")
def straight(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Straight:
    directory = tmp_path_factory.mktemp("straight")
    model, out = tiny_model("qwen3_moe"), directory / "out"
    assert run(distilling(model, out), directory / "log")[0] == 0
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    return Straight(model, out, manifest["trial"]["kept"])


def distilling(model: Path, out: Path) -> list[str]:
    return command(model, out, *DISTILL, recipe="rtn-g64")


def test_a_run_killed_at_every_point_of_the_trial_ends_with_the_same_files(
    straight: Straight, tmp_path: Path
) -> None:
    """One run, killed again and again, a little later each time."""
    out, log = tmp_path / "out", tmp_path / "log"
    points = [
        renaming("without/shards/model-00001-of-"),
        renaming("without/layer-00001.json"),
        renaming("without/streams-00002"),
        renaming("without/quality.json"),
        renaming("out/model-00001-of-"),  # the second walk's first shard
        renaming("walk/streams-00000"),
        renaming("walk/layer-00002.json"),
        renaming("walk/quality.json"),
        renaming(TRIAL_NAME),
    ]
    if not straight.kept:
        points += [
            renaming(f"out/model-0000{n}-of-") for n in (1, 2, 3)
        ]  # moved from the first walk, one by one
    points += [
        renaming(f"out/model-0000{SHARDS}-of-"),
        renaming(MANIFEST_NAME),
        Point("os.remove", PROGRESS_NAME),
    ]
    for point in points:
        assert run(distilling(straight.model, out), log, kill_at=point)[0] == -9, point
    assert run(distilling(straight.model, out), log)[0] == 0
    assert contents(out) == contents(straight.out)
    assert not (out / STATE).exists()


@pytest.mark.parametrize("cut_after", [1, 2])
def test_a_run_killed_while_shards_are_moved_goes_on(
    straight: Straight, tmp_path: Path, cut_after: int
) -> None:
    """Shards of the walk that is kept lie in both places for a moment; `kept` is set to move those of the first."""
    out, log = tmp_path / "out", tmp_path / "log"
    assert run(distilling(straight.model, out), log, kill_at=renaming(TRIAL_NAME))[0] == -9
    without = json.loads((out / STATE / "without" / "quality.json").read_text())["quality"]["mean_kld"]
    verdict = TrialResult(kept=False, kld_without=without, kld_with=without + 1)
    (out / STATE / TRIAL_NAME).write_text(verdict.model_dump_json())
    shards = out / STATE / "without" / "shards"
    digests = {path.name: file_sha256(path) for path in shards.iterdir()}
    for path in sorted(shards.iterdir())[:cut_after]:
        os.replace(path, out / path.name)
    assert run(distilling(straight.model, out), log)[0] == 0
    manifest: dict[str, Any] = json.loads((out / MANIFEST_NAME).read_text())
    assert manifest["quality"]["mean_kld"] == without
    assert {name: file_sha256(out / name) for name in digests} == digests
    assert not (out / STATE).exists()
