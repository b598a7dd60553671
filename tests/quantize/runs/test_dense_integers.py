"""Weights of 2, 3, 5 and 6 bits: every method runs on them, and what is written is what was measured.

Those of 3, 5 and 6 lie across words, which plain transformers does not open: our own unpacker does, in the run's last
check and in `lowbit evaluate`.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.quantize.small_runs import CPU, heldout_ids, mean_kld, recipe_with, reloaded_kld, stored_bytes
from tests.tiny_models import write_tiny_model
from transformers import AutoModelForCausalLM

from lowbit_core.errors import CheckpointError, NumericsError, RecipeError
from lowbit_core.manifest import Manifest
from lowbit_evaluate.loaded_model import load_model
from lowbit_quantize.catalog import CATALOG
from lowbit_quantize.check.preflight import dry_run
from lowbit_quantize.check.reload import answers_of, check_reload
from lowbit_quantize.export.checkpoint import Checkpoint
from lowbit_quantize.export.cli import TARGETS
from lowbit_quantize.export.exporter import export
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.plan import make_plan
from lowbit_quantize.quality.dataset import load_texts
from lowbit_quantize.run.journal import UnopenedLinear
from lowbit_quantize.schemes.storage.stored_linears import OURS

METHODS = (["rtn"], ["awq"], ["gptq"], ["awq", "gptq"])
ACROSS_WORDS = ("W3A16", "W5A16", "W6A16")


def rule(scheme: str, methods: list[str], match: str = "*") -> dict[str, object]:
    return {"match": match, "scheme": scheme, "group_size": 32, "methods": methods}


def evaluated_kld(base: Path, checkpoint: Path, recipe: object) -> float:
    """On the recipe's held-out text, of the checkpoint as `lowbit evaluate` loads it."""
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    after = load_model(find_model(str(checkpoint)), CPU).model
    return mean_kld(before, after, heldout_ids(base, recipe))  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["W2A16", *ACROSS_WORDS])
def test_every_method_runs_and_what_is_written_is_what_was_measured(
    tiny_model: Callable[[str], Path], scheme: str, tmp_path: Path
) -> None:
    base, found = tiny_model("llama"), {}
    for methods in METHODS:
        recipe, out = recipe_with(rule(scheme, methods)), tmp_path / "-".join(methods)
        report = dry_run(str(base), recipe, 24.0, 1 << 30)
        manifest = quantize(str(base), recipe, out, CPU)
        found["-".join(methods)] = manifest.quality.mean_kld
        assert report["tensor_bytes"] == manifest.size.bytes == stored_bytes(out)
        readers = [(one.scheme, one.linears, one.reader) for one in manifest.unopened]
        assert readers == ([] if scheme == "W2A16" else [(scheme, len(manifest.modules), OURS)])
        assert [one.model_dump() for one in manifest.unopened] == report["unopened"]
        measure = reloaded_kld if scheme == "W2A16" else evaluated_kld
        assert measure(base, out, recipe) == pytest.approx(manifest.quality.mean_kld, rel=0.02, abs=1e-4)
    assert found["gptq"] < found["rtn"]
    assert found["awq-gptq"] < found["rtn"]
    (of_scheme,) = report["schemes"]
    assert "with humming-kernels" in of_scheme["gpus"]
    assert of_scheme["cpus"] == "no CPU"
    assert of_scheme["vllm"]["kernels"] == {"cuda": ["HummingLinearKernel"]}
    assert report["tensor_parallel"][0]["obstacles"]["gpu"] == []
    assert "4 bits, not" in report["tensor_parallel"][0]["obstacles"]["cpu"][0]


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "mixtral"])
def test_biases_and_experts_are_read_as_well(
    tiny_model: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    base, recipe = tiny_model(family), recipe_with(rule("W3A16", ["gptq"]))
    manifest = quantize(str(base), recipe, tmp_path / "out", CPU)
    kld = evaluated_kld(base, tmp_path / "out", recipe)
    assert kld == pytest.approx(manifest.quality.mean_kld, rel=0.02, abs=1e-4)
    assert manifest.size.bytes == stored_bytes(tmp_path / "out")


def test_they_stand_beside_schemes_that_transformers_opens(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    mixed = recipe_with(rule("W4A16", ["gptq"]), rule("W3A16", ["gptq"], "*.mlp.*"))
    base = tiny_model("llama")
    manifest = quantize(str(base), mixed, tmp_path / "out", CPU)
    (said,) = manifest.unopened
    assert said.linears == sum(".mlp." in module.name for module in manifest.modules)
    kld = evaluated_kld(base, tmp_path / "out", mixed)
    assert kld == pytest.approx(manifest.quality.mean_kld, rel=0.02, abs=1e-4)


def test_a_head_is_read_as_well(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "llama", tie_word_embeddings=False)
    recipe = recipe_with(rule("W3A16", ["gptq"]), rule("W5A16", ["gptq"], "lm_head"))
    manifest = quantize(str(base), recipe, tmp_path / "out", CPU)
    assert [(one.scheme, one.example) for one in manifest.unopened][-1] == ("W5A16", "lm_head")
    kld = evaluated_kld(base, tmp_path / "out", recipe)
    assert kld == pytest.approx(manifest.quality.mean_kld, rel=0.02, abs=1e-4)
    assert manifest.size.bytes == stored_bytes(tmp_path / "out")


def test_channels_do_not_fit_experts_in_them(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = recipe_with({"match": "*", "scheme": "W3A16", "group_size": "channel", "methods": ["rtn"]})
    with pytest.raises(RecipeError, match="experts of 3 bits in groups only; give a group_size"):
        quantize(str(tiny_model("qwen3_moe")), recipe, tmp_path / "out", CPU)


@pytest.fixture(scope="module")
def written(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Manifest]:
    base, out = tiny_model("llama"), tmp_path_factory.mktemp("dense") / "out"
    return base, out, quantize(str(base), recipe_with(rule("W3A16", ["rtn"])), out, CPU)


def test_the_last_check_finds_a_changed_bit(written: tuple[Path, Path, Manifest], tmp_path: Path) -> None:
    base, out, _ = written
    recipe = recipe_with(rule("W3A16", ["rtn"]))
    reference = find_model(str(base))
    plan, tokenizer = make_plan(reference, recipe), reference.tokenizer()
    answers = answers_of(tokenizer, load_texts(recipe.calibration, recipe.quality, tokenizer, 512)[1])
    checkpoint = Checkpoint(out, CATALOG)
    expected = {}
    for name in plan.unopened:
        linear = checkpoint.linear(name)
        rows, columns = linear.codes.shape
        expected[name] = UnopenedLinear(shape=(rows, columns), sample=linear.sample())
    check_reload(out, (), answers, expected, trust_remote_code=False)
    path = next(out.glob("*.safetensors"))
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("weight_packed"))
    kept = path.read_bytes()
    try:
        save_file(tensors | {name: tensors[name] ^ 1}, path)
        with pytest.raises(NumericsError, match="is unpacked to other numbers than were measured"):
            check_reload(out, (), answers, expected, trust_remote_code=False)
        save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, path)
        with pytest.raises(NumericsError, match="cannot be unpacked"):
            check_reload(out, (), answers, expected, trust_remote_code=False)
    finally:
        path.write_bytes(kept)


def test_another_tools_file_that_names_the_class_of_linears_is_read_too(
    written: tuple[Path, Path, Manifest], tmp_path: Path
) -> None:
    _, out, _ = written
    other = tmp_path / "other"
    shutil.copytree(out, other)
    (other / "lowbit.json").unlink()
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["Linear"]
    config["quantization_config"]["ignore"] = ["lm_head"]
    (other / "config.json").write_text(json.dumps(config))
    ours, theirs = (load_model(find_model(str(place)), CPU).model.state_dict() for place in (out, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


@pytest.mark.parametrize("target", ["autoawq", "autogptq", "gguf", "mlx", "modelopt", "onnx", "openvino"])
def test_exporters_that_have_no_such_numbers_say_so_in_one_line(
    written: tuple[Path, Path, Manifest], target: str, tmp_path: Path
) -> None:
    _, out, _ = written
    with pytest.raises(CheckpointError, match="W3A16") as error:
        export(out, TARGETS[target].load()(), tmp_path / "out")
    assert "\n" not in str(error.value)
