"""Models with zeros, end to end: in 16 bits and quantized, experts as well; and files whose zeros were moved."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.quantize.runs.test_resume import IN_THE_MIDDLE, contents
from tests.quantize.small_runs import (
    CPU,
    PLAIN_EXPERTS,
    SMALL_FLAGS,
    recipe_with,
    reloaded_kld,
    stored_bytes,
    tensors_of,
)
from tests.quantize.stoppable import run as run_until
from tests.tiny_models import write_tiny_model

from lowbit_core.cli import main
from lowbit_core.errors import NumericsError
from lowbit_core.inspection import describe
from lowbit_core.manifest import Manifest
from lowbit_quantize.check.forecast import tensor_bytes
from lowbit_quantize.check.zeros import check_zeros
from lowbit_quantize.methods.sparsity import NofM, Ratio
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.plan import make_plan
from lowbit_quantize.recipe import Recipe

PLAIN = {"match": "*", "scheme": "none", "methods": ["sparsegpt"]}
FOUR_BITS = {"match": "*", "scheme": "W4A16", "group_size": 32, "methods": ["awq", "sparsegpt", "gptq"]}
SHARE = {"match": "*", "scheme": "none", "methods": {"sparsegpt": {"sparsity": 0.6}}}


def made(model: Path, recipe: Recipe, out: Path) -> Manifest:
    manifest = quantize(str(model), recipe, out, CPU)
    plan = make_plan(find_model(str(model)), recipe)
    assert tensor_bytes(plan) == manifest.size.bytes == stored_bytes(out)
    assert reloaded_kld(model, out, recipe) == pytest.approx(manifest.quality.mean_kld, abs=1e-3)
    return manifest


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "granitemoehybrid"])
def test_weights_stay_dense_in_the_bases_type_and_plain_transformers_opens_them(
    tiny_model: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    model, out = tiny_model(family), tmp_path / "out"
    manifest = made(model, recipe_with(PLAIN), out)
    base, sparse = tensors_of(model), tensors_of(out)
    assert {name: (one.shape, one.dtype) for name, one in base.items() if name in sparse} == {
        name: (one.shape, one.dtype) for name, one in sparse.items()
    }
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert manifest.modules
    for module in manifest.modules:
        assert (module.scheme, module.bits, module.methods) == ("BF16", 16, ["sparsegpt"])
        assert module.sparsity is not None
        assert module.sparsity.pattern == "2:4"
        assert 0.5 <= module.sparsity.zeros < 0.502
        if f"{module.name}.weight" in sparse:
            assert NofM(2, 4).holds(sparse[f"{module.name}.weight"])
    assert all(name.endswith(("lm_head", "gate", "router")) for name in manifest.unquantized)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_four_bits_keep_the_zeros_and_the_inputs_scales(
    tiny_model: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    manifest = made(tiny_model(family), recipe_with(FOUR_BITS), tmp_path / "out")
    assert {tuple(module.methods) for module in manifest.modules} == {("awq", "sparsegpt", "gptq")}
    assert any(module.alpha for module in manifest.modules)
    assert all(module.sparsity and module.sparsity.zeros > 0.5 for module in manifest.modules)
    words = str(list(describe(manifest, verified=False).columns[1].cells))
    assert "2:4" in words
    assert "2:4" in (tmp_path / "out" / "README.md").read_text()


def test_a_share_of_zeros_stands_beside_quantized_linears(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    recipe = recipe_with({**FOUR_BITS, "methods": ["rtn"]}, {**SHARE, "match": "*.mlp.*"})
    manifest = made(tiny_model("llama"), recipe, out)
    sparse = [module for module in manifest.modules if module.sparsity]
    assert {module.scheme for module in sparse} == {"BF16"}
    assert {module.name.split(".")[3] for module in sparse} == {"mlp"}
    tensors = tensors_of(out)
    assert all(Ratio(0.6).holds(tensors[f"{module.name}.weight"]) for module in sparse)
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    assert {module.name for module in sparse} <= set(quantization["ignore"])


def test_sparse_attention_stands_beside_quantized_experts_and_plain_ones(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    sparse = {**PLAIN, "match": "*.self_attn.*"}
    experts = {"match": "*.experts.*", "scheme": "W4A16", "group_size": 32, "methods": ["rtn"]}
    made(tiny_model("qwen3_moe"), recipe_with(experts, sparse), tmp_path / "quantized")
    made(tiny_model("qwen3_moe"), recipe_with(FOUR_BITS, PLAIN_EXPERTS), tmp_path / "plain")


def test_the_least_error_is_sparsegpts_and_wandas_is_less_than_magnitudes(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    sums = []
    for method in ("sparsegpt", "wanda", "magnitude"):
        manifest = quantize(
            str(tiny_model("llama")), recipe_with({**PLAIN, "methods": method}), tmp_path / method, CPU
        )
        sums.append(sum(module.error for module in manifest.modules))
    assert sums == sorted(sums)
    assert sums[0] < 0.9 * sums[1]


def test_the_output_matrix_may_be_pruned_too(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", "llama", tie_word_embeddings=False)
    manifest = made(model, recipe_with(PLAIN, {**PLAIN, "match": "lm_head"}), tmp_path / "out")
    assert NofM(2, 4).holds(tensors_of(tmp_path / "out")["lm_head.weight"])
    assert "lm_head" in [module.name for module in manifest.modules]


@pytest.mark.parametrize("rule", [PLAIN, FOUR_BITS], ids=["plain", "four bits"])
def test_zeros_that_are_not_where_they_were_are_found(
    tiny_model: Callable[[str], Path], rule: dict[str, object], tmp_path: Path
) -> None:
    model, recipe, out = tiny_model("llama"), recipe_with(rule), tmp_path / "out"
    manifest = quantize(str(model), recipe, out, CPU)
    plan = make_plan(find_model(str(model)), recipe)
    check_zeros(plan, out, manifest.modules)
    part = "weight" if rule is PLAIN else "weight_packed"
    key = f"{manifest.modules[3].name}.{part}"
    file = next(path for path in out.glob("*.safetensors") if key in load_file(path))
    tensors = load_file(file)
    tensors[key] = tensors[key].roll(1, 0)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=f"{manifest.modules[3].name} has other zeros"):
        check_zeros(plan, out, manifest.modules)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_run_that_was_killed_ends_with_the_files_of_one_that_was_not(
    tiny_model: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    rule = json.dumps([{**FOUR_BITS, "methods": [{"sparsegpt": {"sparsity": "4:8"}}, "gptq"]}])
    flags = ["quantize", "--model", str(tiny_model(family)), "--recipe", "gptq-g64", *SMALL_FLAGS]
    flags += ["--set", f"modules={rule}"]
    assert main([*flags, "--out", str(tmp_path / "whole")]) == 0
    stopped = [*flags, "--out", str(tmp_path / "stopped")]
    assert run_until(stopped, tmp_path / "log", kill_at=IN_THE_MIDDLE)[0] == -9
    assert main(stopped) == 0
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
