"""Runs that make a model smaller: killed and gone on with, by several ranks, forecast, and shown."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.quantize.runs.test_ranks import made
from tests.quantize.runs.test_resume import command, contents
from tests.quantize.small_runs import CPU
from tests.quantize.stoppable import renaming, run
from tests.quantize.tiny_gguf import write_tiny_gguf
from tests.tiny_models import write_tiny_model

from lowbit_core.cli import main
from lowbit_core.inspection import describe
from lowbit_core.manifest import read_manifest
from lowbit_quantize.check.preflight import dry_run
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.recipe import load_recipe
from lowbit_quantize.run.hidden_states import MEMORY_BYTES

DEPTH: dict[str, Any] = {"drop_layers": {"count": 1, "criterion": "measured", "num_samples": 2}}
WIDTH: dict[str, Any] = {"prune_width": {"mlp_channels": 128, "kv_groups": 1}}
EXPERTS: dict[str, Any] = {"prune_width": {"expert_channels": 64}}


def structure(*passes: dict[str, Any]) -> list[str]:
    return ["--set", f"passes={json.dumps([*passes, 'quantize'])}"]


def base_of(family: str, directory: Path) -> Path:
    sizes: dict[str, Any] = {"moe_intermediate_size": 128} if "moe" in family else {}
    return write_tiny_model(directory, family, **sizes)


@pytest.mark.parametrize(("family", "passes"), [("llama", (DEPTH, WIDTH)), ("qwen3_moe", (DEPTH, EXPERTS))])
def test_a_run_killed_anywhere_ends_with_the_files_of_one_that_was_not(
    family: str, passes: tuple[dict[str, Any], ...], tmp_path: Path
) -> None:
    model, out, log = base_of(family, tmp_path / "base"), tmp_path / "out", tmp_path / "log"
    more = structure(*passes)
    assert run(command(model, tmp_path / "straight", *more), log)[0] == 0
    for point in (renaming("layers.json"), renaming("layer-00000.json"), renaming("layer-00001.json")):
        assert run(command(model, out, *more), log, kill_at=point)[0] == -9, point
    assert run(command(model, out, *more), log)[0] == 0
    assert contents(out) == contents(tmp_path / "straight")


@pytest.mark.parametrize(("family", "passes"), [("llama", (DEPTH, WIDTH)), ("qwen3_moe", (DEPTH, EXPERTS))])
def test_ranks_write_the_files_of_one(
    family: str, passes: tuple[dict[str, Any], ...], tmp_path: Path
) -> None:
    model = base_of(family, tmp_path / "base")
    for count in (1, 2):
        made(command(model, tmp_path / f"of-{count}", *structure(*passes)), tmp_path / "log", count)
    assert contents(tmp_path / "of-2") == contents(tmp_path / "of-1")


def test_a_dry_run_knows_the_size_of_what_a_run_then_writes(tmp_path: Path) -> None:
    model = str(base_of("llama", tmp_path / "base"))
    passes = f"passes={json.dumps([DEPTH, WIDTH, 'quantize'])}"
    recipe = load_recipe("gptq-g64", ("calibration.num_samples=4", "quality.num_samples=2", passes))
    report = dry_run(model, recipe, 80.0, MEMORY_BYTES)
    manifest = quantize(model, recipe, tmp_path / "out", CPU)
    assert report["tensor_bytes"] == manifest.size.bytes
    plain = dry_run(model, load_recipe("gptq-g64"), 80.0, MEMORY_BYTES)
    served, before = (one["tensor_parallel"][0]["kv_bytes_per_token_per_rank"] for one in (report, plain))
    assert served * 3 == before  # two of three layers, and one of two heads: 2/3 · 1/2
    assert report["parameters"] == plain["parameters"]
    assert report["structure"].startswith("2 of 3 layers by measured, which the run measures")
    assert "intermediate_size 192 to 128" in report["structure"]
    assert plain["structure"] is None


def test_the_manifest_and_inspect_say_what_was_taken_out(tmp_path: Path) -> None:
    model = str(base_of("llama", tmp_path / "base"))
    passes = f"passes={json.dumps([{'drop_layers': {'layers': [2]}}, WIDTH])}"
    few = ("calibration.num_samples=4", "quality.num_samples=2", "modules=[]", passes)
    quantize(model, load_recipe("gptq-g64", few), tmp_path / "out", CPU)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.structure is not None
    assert manifest.structure.sizes == {"intermediate_size": (192, 128), "num_key_value_heads": (2, 1)}
    assert manifest.figures.keys() == {0, 1}
    assert all(len(errors) == 2 for errors in manifest.figures.values())
    rows = zip(*(column.cells for column in describe(manifest, verified=False).columns), strict=True)
    assert dict(rows)["structure"].startswith("2 of 3 layers, without 2; intermediate_size 192 to 128")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prune_width": {"mlp_channels": 130}}, "the nearest are 64 and 128"),
        ({"prune_width": {"kv_groups": 0}}, "kv_groups = 0: allowed is 1 or more"),
        ({"drop_layers": {"count": 7}}, "drops 7 of 3 layers"),
    ],
)
def test_a_refusal_is_one_line_with_status_2(
    tiny_model: Callable[[str], Path],
    options: dict[str, Any],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    capsys.readouterr()
    assert main(command(model, out, *structure(options))) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not out.exists()


def test_a_gguf_base_loses_layers_and_channels_like_a_directory(tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "model")
    passes = f"passes={json.dumps([DEPTH, WIDTH, 'quantize'])}"
    recipe = load_recipe("gptq-g64", ("calibration.num_samples=4", "quality.num_samples=2", passes))
    manifest = quantize(str(model), recipe, tmp_path / "out", CPU)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert manifest.structure is not None
    assert config["num_hidden_layers"] == len(manifest.structure.kept_layers) == manifest.structure.layers - 1
    assert (config["intermediate_size"], config["num_key_value_heads"]) == (128, 1)


@pytest.mark.parametrize("passes", [(WIDTH,), ({"drop_layers": {"layers": [1]}},)])
def test_linears_that_stay_make_up_for_what_went(passes: tuple[dict[str, Any], ...], tmp_path: Path) -> None:
    """By `compensate` in 16 bits, and by GPTQ on the way to 4."""
    model = str(base_of("llama", tmp_path / "base"))
    found = {}
    for name, scheme, method in (("16", "none", ""), ("16 made up", "none", "compensate"), ("8", "W8A16", "rtn"),
                                 ("8 made up", "W8A16", "gptq")):  # fmt: skip
        group = {} if scheme == "none" else {"group_size": 32}
        rules = [{"match": "*", "scheme": scheme, "methods": [method], **group}] if method else []
        order = [*passes, "quantize"] if method else [*passes]
        settings = (
            "calibration.num_samples=32", "quality.num_samples=8", "kv_cache.dtype=none",
            f"modules={json.dumps(rules)}", f"passes={json.dumps(order)}",
        )  # fmt: skip
        found[name] = quantize(
            model, load_recipe("gptq-g64", settings), tmp_path / name, CPU
        ).quality.mean_kld
    assert found["16 made up"] < 0.95 * found["16"]
    assert found["8 made up"] < 0.95 * found["8"]
