"""The report on all criteria: what it says of a layer is what pruning that layer does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantize.layers.test_decoder import decoder_of
from tests.quantize.layers.test_prune_experts import EVERY
from tests.quantize.small_runs import CPU, SMALL_FLAGS, pruning, recipe_of

from lowbit_core.cli import main
from lowbit_quantize.check.expert_report import report_experts
from lowbit_quantize.model.hooks import inputs_of
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.passes.distill_router import SAMPLE_TOKENS
from lowbit_quantize.passes.prune_experts import prune_layer
from lowbit_quantize.quality.dataset import load_texts
from lowbit_quantize.statistics.sample import Sample


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v2"])
def test_reported_errors_are_those_of_the_pruned_block(
    tiny_model: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    recipe = recipe_of("awq-g64", pruning(prune_ratio=0.5))
    report = report_experts(str(tiny_model(family)), recipe, tmp_path / "report.json", CPU)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    first = report["layers"][0]
    decoder = decoder_of(tiny_model(family))
    tokenizer = find_model(str(tiny_model(family))).tokenizer()
    hidden = decoder.embed(load_texts(recipe.calibration, recipe.quality, tokenizer, 512)[0].ids)
    for index in range(first["layer"]):
        decoder.advance(decoder.load_layer(index), index, hidden)
    for criterion in EVERY[:-1]:
        layer, sample = decoder.load_layer(first["layer"]), Sample(SAMPLE_TOKENS)
        with inputs_of(layer, {decoder.architecture.router: sample.add}):
            list(decoder.run_layer(layer, first["layer"], hidden))
        block: Any = layer.get_submodule(decoder.architecture.moe_block)
        with torch.no_grad():
            whole = block(sample.rows()[None]).float()
            prune_layer(layer, decoder.architecture, torch.tensor(first["kept"]["4"][criterion]))
            error = (block(sample.rows()[None]).float() - whole).square().sum() / whole.square().sum()
        assert first["error"]["4"][criterion] == pytest.approx(float(error), rel=0.02)


def test_the_command_reports_both_shares_and_writes_one_file(
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = str(tiny_model("qwen3_moe"))
    assert main(["quantize", "--model", model, "--recipe", "awq-g64", "--experts-report", *SMALL_FLAGS]) == 0
    captured = capsys.readouterr()
    assert [path.name for path in tmp_path.iterdir()] == ["experts-report.json"]
    printed = json.loads(captured.out.strip().splitlines()[-1])
    report = json.loads((tmp_path / "experts-report.json").read_text())
    assert printed["report"] == "experts-report.json"
    assert set(report["mean_error"]) == {"6", "4"}
    for kept, errors in report["mean_error"].items():
        assert set(errors) == set(EVERY)
        assert errors[report["least_error"][kept]] == min(errors.values())
    assert [layer["layer"] for layer in report["layers"]] == [1, 2]
    for layer in report["layers"]:
        assert sum(layer["tokens"]) == 2 * report["calibration"]["tokens"]
        assert set(layer["scores"]) == set(EVERY)
    assert "| criterion | 6 stay | 4 stay |" in captured.err


def test_a_report_that_cannot_be_made_is_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(model: str, *arguments: str) -> str:
        directory = str(tiny_model(model))
        capsys.readouterr()  # what making the model printed
        assert main(["quantize", "--model", directory, "--recipe", "awq-g64", *arguments]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert not list(tmp_path.iterdir())
        return line

    file = str(tmp_path / "report.json")
    assert "has no experts" in refused("llama", "--experts-report", file)
    assert "directory that exists" in refused(
        "qwen3_moe", "--experts-report", str(tmp_path / "no" / "r.json")
    )
    assert "one of them" in refused("qwen3_moe", "--experts-report", file, "--out", str(tmp_path / "out"))
    assert "one of them" in refused("qwen3_moe")
