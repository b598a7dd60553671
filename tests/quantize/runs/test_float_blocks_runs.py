"""Runs in NVFP4, MXFP4, MXFP8, W4A8 and W4AFP8: what is read back is what was measured, experts too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantize.edited_bases import Tensors, edited
from tests.quantize.runs.test_rounded_inputs import logits
from tests.quantize.small_runs import CPU, heldout_ids, recipe_with, stored_bytes, tensors_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowbit_core.errors import RecipeError
from lowbit_core.manifest import Manifest
from lowbit_evaluate.loaded_model import LoadedModel, load_model
from lowbit_quantize.check.preflight import dry_run
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.recipe import Recipe

NO_DOWN = {"match": "*.down_proj", "scheme": "none"}  # of 192 inputs, which groups of 128 do not divide
RULES: dict[str, list[dict[str, Any]]] = {
    "NVFP4 nearest": [{"match": "*", "scheme": "NVFP4", "methods": ["rtn"]}],
    "NVFP4": [{"match": "*", "scheme": "NVFP4", "methods": ["smoothquant", "gptq"]}],
    "NVFP4A16": [{"match": "*", "scheme": "NVFP4A16", "methods": ["awq", "gptq"]}],
    "MXFP4": [{"match": "*", "scheme": "MXFP4", "methods": ["gptq"]}],
    "MXFP8": [{"match": "*", "scheme": "MXFP8", "methods": ["rtn"]}],
    "W4A8": [{"match": "*", "scheme": "W4A8", "group_size": 64, "methods": ["smoothquant", "gptq"]}],
    "W4AFP8": [{"match": "*", "scheme": "W4AFP8", "methods": ["gptq"]}, NO_DOWN],
    "a mix": [
        {"match": "*", "scheme": "NVFP4", "methods": ["gptq"]},
        {"match": "*.self_attn.*", "scheme": "MXFP8", "methods": ["rtn"]},
        {"match": "*.o_proj", "scheme": "W8A8", "methods": ["rtn"]},
        {"match": "*.layers.0.mlp.*", "scheme": "MXFP4A16", "methods": ["awq"]},
    ],
}


def log_probabilities(model: LoadedModel, ids: Tensor) -> Tensor:
    return torch.log_softmax((model.hidden(ids)[:, :-1].float() @ model.head.float().T).double(), -1)


def evaluated_kld(base: Path, checkpoint: Path, recipe: Recipe) -> float:
    """Mean KL as `lowbit evaluate` loads both."""
    before, after = (load_model(find_model(str(path)), CPU) for path in (base, checkpoint))
    ids = heldout_ids(base, recipe)
    p, q = (log_probabilities(model, ids) for model in (before, after))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", RULES)
def test_a_reader_computes_what_was_measured_and_the_forecast_is_what_lies_there(
    tiny_model: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    base, recipe, out = tiny_model("llama"), recipe_with(*RULES[name]), tmp_path / "out"
    manifest = quantize(str(base), recipe, out, CPU)
    assert evaluated_kld(base, out, recipe) == pytest.approx(manifest.quality.mean_kld, rel=0.02, abs=1e-5)
    report = dry_run(str(base), recipe, 24.0, 1 << 30)
    assert report["tensor_bytes"] == manifest.size.bytes == stored_bytes(out)
    cpu = report["tensor_parallel"][0]["obstacles"]["cpu"]
    assert any("no CPU kernel for" in reason for reason in cpu) == (name != "W4A8")
    for one in manifest.modules:
        stored = tensors_of(out).get(f"{one.name}.input_global_scale")
        assert (None if stored is None else float(stored)) == one.input_scale
        assert (one.inputs is not None) == (one.scheme not in ("NVFP4A16", "MXFP4A16"))


@pytest.mark.parametrize("scheme", ["NVFP4A16", "MXFP4A16"])
def test_plain_transformers_computes_what_was_measured_of_weights_alone(
    tiny_model: Callable[[str], Path], scheme: str, tmp_path: Path
) -> None:
    """Its decompression gives the very weights of the walk."""
    base, out = tiny_model("qwen2"), tmp_path / "out"
    recipe = recipe_with({"match": "*", "scheme": scheme, "methods": ["gptq"]})
    manifest = quantize(str(base), recipe, out, CPU)
    before, after = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in (base, out))
    ids = heldout_ids(base, recipe)
    with torch.inference_mode():
        p, q = (torch.log_softmax(logits(model, ids), -1) for model in (before, after))
    kld = float((p.exp() * (p - q)).sum(-1).mean())
    assert kld == pytest.approx(manifest.quality.mean_kld, rel=0.02, abs=1e-5)


def test_gptq_loses_less_than_rounding_to_the_nearest(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    for scheme in ("NVFP4A16", "MXFP4A16"):
        losses = []
        for method in ("rtn", "gptq"):
            recipe = recipe_with({"match": "*", "scheme": scheme, "methods": [method]})
            out = tmp_path / f"{scheme}-{method}"
            losses.append(quantize(str(tiny_model("llama")), recipe, out, CPU).quality.mean_kld)
        assert losses[1] < 0.75 * losses[0]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_what_engines_fuse_shares_its_global_scales(
    tiny_model: Callable[[str], Path], method: str, tmp_path: Path
) -> None:
    """vLLM serves all of it under the largest of them."""
    recipe = recipe_with({"match": "*", "scheme": "NVFP4", "methods": [method]})
    quantize(str(tiny_model("llama")), recipe, tmp_path / "out", CPU)
    tensors = tensors_of(tmp_path / "out")
    for kind in ("input_global_scale", "weight_global_scale"):
        for block, names in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            found = {float(tensors[f"model.layers.0.{block}.{name}_proj.{kind}"]) for name in names}
            assert len(found) == 1


def unlucky(tensors: Tensors) -> Tensors:
    """Of layer 1: expert 0 is chosen by no token, expert 1 is all zeros, expert 2 has one weight of 3,000."""
    block = "model.layers.1.mlp"
    router = tensors[f"{block}.gate.weight"].clone()
    router[0], router[3::2] = (
        0.0,
        -router[2::2],
    )  # of each pair of the others one is above it, and two are chosen
    changed = dict(tensors) | {f"{block}.gate.weight": router}
    for part in ("gate_proj", "up_proj", "down_proj"):
        name = f"{block}.experts.1.{part}.weight"
        changed[name] = torch.zeros_like(tensors[name])
        outlier = tensors[f"{block}.experts.2.{part}.weight"].clone()
        outlier[3, 5] = 3000.0
        changed[f"{block}.experts.2.{part}.weight"] = outlier
    return changed


@pytest.mark.parametrize(
    ("scheme", "method"), [("NVFP4", "rtn"), ("NVFP4", "gptq"), ("MXFP4", "gptq"), ("MXFP8", "awq")]
)
def test_experts_have_finite_scales_whatever_they_are_and_have_seen(
    tiny_model: Callable[[str], Path], scheme: str, method: str, tmp_path: Path
) -> None:
    base = edited(tiny_model("qwen3_moe"), tmp_path / "base", unlucky)
    recipe, out = recipe_with({"match": "*", "scheme": scheme, "methods": [method]}), tmp_path / "out"
    manifest = quantize(str(base), recipe, out, CPU)
    assert manifest.experts is not None
    seen = {(one.layer, one.expert): one.tokens for one in manifest.experts.under_calibrated}
    assert seen[1, 0] == 0
    for name, tensor in tensors_of(out).items():
        if name.endswith("_scale"):
            assert torch.isfinite(tensor.float()).all(), name
            assert (tensor.float() > 0).all(), name
    assert evaluated_kld(base, out, recipe) == pytest.approx(manifest.quality.mean_kld, rel=0.05, abs=1e-4)


@pytest.fixture(scope="module")
def mixture(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Manifest, Recipe]:
    out = tmp_path_factory.mktemp("mixture") / "out"
    recipe = recipe_with({"match": "*", "scheme": "NVFP4", "methods": ["gptq"]})
    return out, quantize(str(tiny_model("qwen3_moe")), recipe, out, CPU), recipe


def test_the_manifest_says_which_reader_opens_experts_in_nvfp4(
    mixture: tuple[Path, Manifest, Recipe],
) -> None:
    _, manifest, _ = mixture
    (said,) = manifest.unopened
    experts = [module.name for module in manifest.modules if ".experts." in module.name]
    assert (said.scheme, said.linears, said.reader) == ("NVFP4", len(experts), "compressed-tensors")


def test_the_gate_and_up_of_each_expert_share_their_global_scales(
    mixture: tuple[Path, Manifest, Recipe],
) -> None:
    tensors = tensors_of(mixture[0])
    for number in range(8):
        for kind in ("input_global_scale", "weight_global_scale"):
            names = [f"model.layers.1.mlp.experts.{number}.{part}_proj.{kind}" for part in ("gate", "up")]
            assert tensors[names[0]] == tensors[names[1]]
            assert float(tensors[names[0]]).hex().startswith("0x1.0000000000000p")  # a power of two


def test_the_dry_run_of_a_mixture_says_that_no_cpu_runs_it(
    tiny_model: Callable[[str], Path], mixture: tuple[Path, Manifest, Recipe]
) -> None:
    report = dry_run(str(tiny_model("qwen3_moe")), mixture[2], 24.0, 1 << 30)
    (row,) = report["schemes"]
    assert (row["scheme"], row["cpu"]) == ("NVFP4", False)
    assert "Blackwell" in row["gpus"]
    assert "no CPU" in row["experts"]
    assert report["tensor_parallel"][0]["obstacles"]["gpu"] == []
    assert report["tensor_bytes"] == stored_bytes(mixture[0])


@pytest.mark.parametrize(
    ("family", "rule", "words"),
    [
        ("qwen2", {"match": "*", "scheme": "MXFP4", "group_size": 64}, "groups of 32 inputs and no others; leave"),
        ("qwen2", {"match": "*", "scheme": "W4AFP8"}, "W4AFP8 does not fit the 192 inputs of .*down_proj"),
        ("qwen2", {"match": "lm_head", "scheme": "NVFP4"}, "rounds what lm_head reads, which quality is not"),
        ("qwen2", {"match": "lm_head", "scheme": "NVFP4A16"}, "one scale for all of lm_head, which"),
        ("qwen3_moe", {"match": "*", "scheme": "W4A8", "group_size": 64}, "no packed experts with int8 inputs; give"),
    ],
    ids=["a group size", "Hopper's groups", "a rounded head", "a head in blocks", "packed experts"],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    tiny_model: Callable[[str], Path], family: str, rule: dict[str, object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        quantize(str(tiny_model(family)), recipe_with(rule), tmp_path / "out", CPU)
    assert not (tmp_path / "out").exists()
