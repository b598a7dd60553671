"""The report on all criteria: what it says of a layer is what pruning that layer does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantize.layers.test_decoder import decoder_of
from tests.quantize.layers.test_prune_experts import EVERY, pruned_only
from tests.quantize.small_runs import CPU, SMALL_FLAGS, pruning, recipe_of
from torch import Tensor, nn

from lowbit_core.cli import main
from lowbit_quantize.check.expert_report import MERGINGS, report_experts
from lowbit_quantize.model.decoder import Decoder
from lowbit_quantize.model.hooks import inputs_of
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.passes.distill_router import SAMPLE_TOKENS
from lowbit_quantize.passes.prune_experts import prune_layer
from lowbit_quantize.plan import make_plan
from lowbit_quantize.quality.dataset import load_texts
from lowbit_quantize.recipe import Recipe
from lowbit_quantize.statistics.sample import Sample
from lowbit_quantize.walk.layer import LayerContext


def what_a_layer_reads(base: Path, recipe: Recipe, index: int) -> tuple[Decoder, Tensor]:
    """A decoder, and the base model's calibration text before a layer."""
    decoder, tokenizer = decoder_of(base), find_model(str(base)).tokenizer()
    hidden = decoder.embed(load_texts(recipe.calibration, recipe.quality, tokenizer, 512)[0].ids)
    for before in range(index):
        decoder.advance(decoder.load_layer(before), before, hidden)
    return decoder, hidden


def block_inputs(decoder: Decoder, index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What the block of an unchanged layer reads and gives."""
    layer, sample = decoder.load_layer(index), Sample(SAMPLE_TOKENS)
    with inputs_of(layer, {decoder.architecture.router: sample.add}):
        list(decoder.run_layer(layer, index, hidden))
    return sample.rows(), block_output(decoder, layer, sample.rows())


def block_output(decoder: Decoder, layer: nn.Module, inputs: Tensor) -> Tensor:
    block: Any = layer.get_submodule(decoder.architecture.moe_block)
    with torch.no_grad():
        return block(inputs[None]).float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v2"])
def test_reported_errors_are_those_of_the_pruned_and_of_the_merged_block(
    tiny_model: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    recipe = recipe_of("awq-g64", pruning(prune_ratio=0.5))
    report = report_experts(str(tiny_model(family)), recipe, tmp_path / "report.json", CPU)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    first = report["layers"][0]
    index = first["layer"]
    decoder, hidden = what_a_layer_reads(tiny_model(family), recipe, index)
    inputs, whole = block_inputs(decoder, index, hidden)

    def error(layer: nn.Module) -> float:
        given = block_output(decoder, layer, inputs)
        return float((given - whole).square().sum() / whole.square().sum())

    for criterion in EVERY[:-1]:
        layer = decoder.load_layer(index)
        prune_layer(layer, decoder.architecture, torch.tensor(first["kept"]["4"][criterion]))
        assert first["error"]["4"][criterion] == pytest.approx(error(layer), rel=0.02)
    for name, found in first["merging"]["4"].items():
        consolidate, similarity = name.split(" by ")
        merging = pruned_only(prune_ratio=0.5, consolidate=consolidate, similarity=similarity)
        context = LayerContext(decoder, index, {}, hidden, None, fp8_cache=False)
        layer = decoder.load_frame(index)
        make_plan(find_model(str(tiny_model(family))), merging).passes[0].run(layer, context)
        assert found["error"] == pytest.approx(error(layer), rel=0.02)
        assert {int(gone): by for gone, by in found["absorbed_by"].items()} == context.result.absorbed_by


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
        assert set(report["merging_error"][kept]) == set(MERGINGS)
    assert [layer["layer"] for layer in report["layers"]] == [1, 2]
    for layer in report["layers"]:
        assert sum(layer["tokens"]) == 2 * report["calibration"]["tokens"]
        assert set(layer["scores"]) == set(EVERY)
    assert "| criterion | 6 stay | 4 stay |" in captured.err
    assert "| reap, permute by output | " in captured.err


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
