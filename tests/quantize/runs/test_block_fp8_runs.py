"""FP8 in blocks, whole runs: each method, edges that 128 does not divide as vLLM takes or refuses them, and experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantize.small_runs import CPU, heldout_ids, mean_kld, recipe_with, reloaded_kld, stored_bytes
from tests.tiny_models import write_tiny_model
from transformers import AutoModelForCausalLM

from lowbit_core.errors import CheckpointError, RecipeError
from lowbit_core.tensorrt_llm import tensorrt_llm_reads
from lowbit_evaluate.loaded_model import load_model
from lowbit_quantize.catalog import CATALOG
from lowbit_quantize.check.preflight import dry_run
from lowbit_quantize.export.checkpoint import Checkpoint
from lowbit_quantize.export.cli import TARGETS
from lowbit_quantize.export.exporter import export
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.recipe import Recipe
from lowbit_quantize.schemes.storage.stored_linears import OURS

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


def rule(*methods: str, match: str = "*") -> dict[str, object]:
    return {"match": match, "scheme": "FP8_BLOCK", "methods": list(methods)}


def evaluated_kld(base: Path, checkpoint: Path, recipe: Recipe) -> float:
    """On the recipe's held-out text, of the checkpoint as `lowbit evaluate` loads it."""
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    return mean_kld(before, load_model(find_model(str(checkpoint)), CPU).model, heldout_ids(base, recipe))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("blocks"), "llama", **SIZES)


def test_every_method_runs_and_what_is_written_is_what_was_measured(base: Path, tmp_path: Path) -> None:
    found = {}
    for methods in (("rtn",), ("awq",), ("gptq",), ("awq", "gptq"), ("smoothquant", "gptq")):
        recipe, out = recipe_with(rule(*methods)), tmp_path / "-".join(methods)
        report = dry_run(str(base), recipe, 24.0, 1 << 30)
        manifest = quantize(str(base), recipe, out, CPU)
        found["-".join(methods)] = kld = manifest.quality.mean_kld
        assert report["tensor_bytes"] == manifest.size.bytes == stored_bytes(out)
        assert manifest.unopened == []
        assert {module.inputs for module in manifest.modules} == {"fp8 in groups of 128"}
        assert evaluated_kld(base, out, recipe) == pytest.approx(kld, rel=0.02)
        assert reloaded_kld(base, out, recipe) == pytest.approx(kld, rel=0.1)  # which rounds inputs otherwise
    assert found["gptq"] < found["rtn"]
    config = Checkpoint(tmp_path / "gptq", CATALOG).config["quantization_config"]
    assert tensorrt_llm_reads(config) == ("FP8_BLOCK_SCALES", "")
    (of_scheme,) = report["schemes"]
    assert (
        of_scheme["cpus"]
        == "CPUs with AMX-FP8 with inputs rounded by token or with AMX with inputs as they are"
    )
    assert of_scheme["vllm"]["class"] == "CompressedTensorsW8A8Fp8"
    for target in ("autoawq", "autogptq", "gguf", "mlx", "onnx", "openvino", "modelopt"):
        with pytest.raises(CheckpointError, match="FP8_BLOCK"):
            export(tmp_path / "gptq", TARGETS[target].load()(), tmp_path / "other")


def test_edges_that_vllm_takes_are_written_and_read(tmp_path: Path) -> None:
    """o and down are matrices by themselves: their outputs may end within a block, here 320."""
    narrow = write_tiny_model(tmp_path / "base", "llama", **SIZES | {"hidden_size": 320})
    recipe = recipe_with(rule("gptq", match="*.down_proj"), rule("gptq", match="*.o_proj"))
    manifest = quantize(str(narrow), recipe, tmp_path / "out", CPU)
    assert [(one.scheme, one.linears, one.reader) for one in manifest.unopened] == [("FP8_BLOCK", 6, OURS)]
    assert manifest.size.bytes == stored_bytes(tmp_path / "out")
    kld = evaluated_kld(narrow, tmp_path / "out", recipe)
    assert kld == pytest.approx(manifest.quality.mean_kld, rel=0.02)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (
            {"hidden_size": 320},
            "does not fit the 320 inputs of model.layers.0.self_attn.q_proj: engines round them in groups "
            "of 128, and no part of one; give a rule for it with another scheme",
        ),
        (
            {"num_key_value_heads": 1},
            "does not fit model.layers.0.self_attn.q_proj, which engines make one matrix of with k_proj, v_proj: 64 "
            "outputs do not fill blocks of 128",
        ),
        ({"intermediate_size": 448}, "does not fit the 448 inputs of model.layers.0.mlp.down_proj"),
    ],
    ids=["inputs", "keys beside queries", "a network's middle"],
)
def test_edges_that_vllm_refuses_are_refused_in_one_line(
    sizes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    odd = write_tiny_model(tmp_path / "base", "llama", **SIZES | sizes)
    with pytest.raises(RecipeError) as error:
        quantize(str(odd), recipe_with(rule("rtn")), tmp_path / "out", CPU)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_group_size_of_its_own_is_all_that_it_has(base: Path, tmp_path: Path) -> None:
    recipe = recipe_with(rule("rtn") | {"group_size": 64})
    with pytest.raises(
        RecipeError, match="FP8_BLOCK has groups of 128 inputs and no others; leave group_size out"
    ):
        quantize(str(base), recipe, tmp_path / "out", CPU)


def test_experts_are_read_by_our_own_unpacker(tmp_path: Path) -> None:
    mixture = write_tiny_model(tmp_path / "base", "qwen3_moe", **SIZES | {"moe_intermediate_size": 128})
    recipe = recipe_with(rule("gptq"))
    report = dry_run(str(mixture), recipe, 24.0, 1 << 30)
    manifest = quantize(str(mixture), recipe, tmp_path / "out", CPU)
    experts = [module.name for module in manifest.modules if ".experts." in module.name]
    assert [(one.scheme, one.linears, one.reader) for one in manifest.unopened] == [
        ("FP8_BLOCK", len(experts), OURS)
    ]
    assert "CPUs with AMX" in report["schemes"][0]["experts"]
    one, two, *_ = report["tensor_parallel"]
    assert one["obstacles"] == {"gpu": [], "cpu": []}
    assert any("64 outputs do not fill blocks of 128" in line for line in two["obstacles"]["gpu"])
    assert evaluated_kld(mixture, tmp_path / "out", recipe) == pytest.approx(
        manifest.quality.mean_kld, rel=0.02
    )


def test_parts_of_ranks_that_end_within_a_block_are_said(base: Path) -> None:
    report = dry_run(str(base), recipe_with(rule("rtn")), 24.0, 1 << 30)
    _, two, *_ = report["tensor_parallel"]
    assert two["obstacles"]["gpu"] == [
        "self_attn.q_proj: 64 outputs do not fill blocks of 128",
        "mlp.gate_proj: 192 outputs do not fill blocks of 128",
        "mlp.down_proj: groups of 128 straddle ranks that hold 192 of 384 inputs",
    ]
