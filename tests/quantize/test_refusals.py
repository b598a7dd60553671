"""What is refused, is refused by the command with one clear line, status 2, and nothing written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_models import write_tiny_model

from lowbit_core.cli import main
from lowbit_core.errors import OutputError
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.plan import check_disk, make_plan
from lowbit_quantize.recipe import load_recipe
from lowbit_quantize.source import find_model


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `lowbit quantize`, expect status 2 and no output directory, and return the one line on stderr."""

    def run(model: Path | str, *arguments: str, recipe: str = "awq-g64") -> str:
        capsys.readouterr()  # what making the model printed
        out = tmp_path / "out"
        before = sorted(path for path in tmp_path.rglob("*"))
        status = main(["quantize", "--model", str(model), "--recipe", recipe, "--out", str(out), *arguments])
        captured = capsys.readouterr()
        assert status == 2
        assert captured.out == ""
        assert sorted(path for path in tmp_path.rglob("*")) == before
        lines = captured.err.strip().splitlines()
        assert len(lines) == 1
        return lines[0].removeprefix("lowbit: error: ")

    return run


@pytest.mark.parametrize("model", ["/nowhere/model", "./nowhere", "nowhere.gguf", "a b c"])
def test_a_missing_model(refused: Callable[..., str], model: str) -> None:
    assert model in refused(model)


def test_a_directory_without_weights(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert "no config.json" in refused(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "llama"}')
    assert "no safetensors weights" in refused(tmp_path / "m")


@pytest.mark.parametrize("model_type", ["gpt2", "made_up"])
def test_an_unknown_architecture(refused: Callable[..., str], tmp_path: Path, model_type: str) -> None:
    directory = write_tiny_model(tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    assert f"has the architecture '{model_type}'; supported are: llama, mistral, qwen2, qwen3" in refused(
        directory
    )


def test_a_file_that_is_not_gguf(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"not a model at all" * 10)
    assert "is not a readable GGUF file" in refused(tmp_path / "m.gguf")


def test_a_group_size_that_does_not_divide_a_layers_input(
    refused: Callable[..., str], tiny_model: Callable[[str], Path]
) -> None:
    line = refused(tiny_model("llama"), recipe="awq")
    assert "weights.group_size = 128 does not divide the 192 inputs of model.layers.0.mlp.down_proj" in line
    assert "allowed here: 32, 64" in line


def test_an_unknown_recipe_key(refused: Callable[..., str], tiny_model: Callable[[str], Path]) -> None:
    assert "unknown key 'weights.bit'" in refused(tiny_model("llama"), "--set", "weights.bit=4")


def test_an_output_directory_that_holds_something_else(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    arguments = ["quantize", "--model", str(tiny_model("llama")), "--recipe", "awq-g64", "--out"]
    assert main([*arguments, str(tmp_path)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "thesis.tex")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_checkpoint_of_another_recipe_is_not_overwritten(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    small = (
        "calibration.sequences=2",
        "calibration.sequence_tokens=32",
        "quality.sequences=2",
        "quality.sequence_tokens=32",
    )
    quantize(str(tiny_model("llama")), load_recipe("rtn-g64", small), tmp_path / "out", torch.device("cpu"))
    with pytest.raises(OutputError, match="another model or recipe"):
        quantize(
            str(tiny_model("llama")), load_recipe("awq-g64", small), tmp_path / "out", torch.device("cpu")
        )


def test_too_little_disk(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    plan = make_plan(find_model(str(tiny_model("llama"))), load_recipe("awq-g64"))
    check_disk(plan, tmp_path / "not" / "yet" / "there")
    with pytest.raises(OutputError, match=r"needs \d+ MiB and its disk has 1 MiB free"):
        check_disk(plan, tmp_path, free_bytes=lambda _: 1 << 20)


def test_text_that_does_not_exist(refused: Callable[..., str], tiny_model: Callable[[str], Path]) -> None:
    assert "'nowhere.jsonl' is not an existing" in refused(
        tiny_model("llama"), "--calibration", "nowhere.jsonl"
    )


def test_a_device_that_is_not_there(refused: Callable[..., str], tiny_model: Callable[[str], Path]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert "sees no CUDA device" in refused(tiny_model("llama"), "--device", "cuda")


def test_a_weight_that_is_not_finite_stops_the_run_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_tiny_model(tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert (
        main(["quantize", "--model", str(directory), "--recipe", "awq-g64", "--out", str(tmp_path / "out")])
        == 1
    )
    assert "mlp.up_proj" in capsys.readouterr().err
    assert not (tmp_path / "out" / "lowbit.json").exists()
