"""Schemes whose inputs are rounded: what the walk measures is what a reader of the files computes."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantize.small_runs import CPU, heldout_ids, recipe_with, stored_bytes, tensors_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowbit_core.errors import RecipeError
from lowbit_evaluate.rounded_inputs import round_inputs
from lowbit_quantize.check.preflight import dry_run
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.recipe import Recipe

MIX = (
    {"match": "*", "scheme": "W4A16", "group_size": 32, "methods": ["awq", "gptq"]},
    {"match": "*.self_attn.*", "scheme": "W8A8", "methods": ["smoothquant", "gptq"]},
    {"match": "*.down_proj", "scheme": "FP8", "methods": ["rtn"]},
    {"match": "*.layers.0.*", "scheme": "none"},
)
RECIPES = {
    "W8A8": recipe_with({"match": "*", "scheme": "W8A8", "methods": ["smoothquant", "gptq"]}),
    "W8A8 nearest": recipe_with({"match": "*", "scheme": "W8A8", "methods": ["rtn"]}),
    "FP8_DYNAMIC": recipe_with({"match": "*", "scheme": "FP8_DYNAMIC", "methods": ["gptq"]}),
    "FP8": recipe_with({"match": "*", "scheme": "FP8", "methods": ["smoothquant", "rtn"]}),
    "a mix": recipe_with(*MIX),
}


def read_kld(base: Path, checkpoint: Path, recipe: Recipe) -> tuple[float, int]:
    """Mean KL of a checkpoint as it is read back, and how many of its linears round what they read."""
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in (base, checkpoint)
    )
    rounding, ids = round_inputs(after), heldout_ids(base, recipe)
    with torch.inference_mode():
        p, q = (torch.log_softmax(logits(model, ids), -1) for model in (before, after))
    return float((p.exp() * (p - q)).sum(-1).mean()), rounding


def logits(model: Any, ids: Tensor) -> Tensor:
    """In float32, as the walk makes them; transformers would round them to bfloat16."""
    model(ids[:1, :2])  # compressed-tensors unpacks when the model as a whole is first called
    states: Tensor = model.model(ids).last_hidden_state[:, :-1]
    found: Tensor = states.float() @ model.lm_head.weight.float().T
    return found.double()


@pytest.mark.parametrize(
    ("family", "name"),
    [*(("llama", name) for name in RECIPES), ("qwen2", "W8A8"), ("gemma3_text", "W8A8"), ("qwen2", "FP8")],
)
def test_a_reader_computes_what_was_measured_and_the_forecast_is_what_lies_there(
    tiny_model: Callable[[str], Path], family: str, name: str, tmp_path: Path
) -> None:
    base, recipe, out = tiny_model(family), RECIPES[name], tmp_path / "out"
    manifest = quantize(str(base), recipe, out, CPU)
    kld, rounding = read_kld(base, out, recipe)
    # bfloat16 rounds otherwise by the batch, and what is on the edge of a code falls to the other side
    assert kld == pytest.approx(manifest.quality.mean_kld, rel=0.05, abs=2e-4)
    rounded = [module for module in manifest.modules if module.inputs]
    assert len(rounded) == rounding > 0
    assert dry_run(str(base), recipe, 24.0, 1 << 30)["tensor_bytes"] == stored_bytes(out)
    static = {f"{module.name}.input_scale": module.input_scale for module in rounded if module.input_scale}
    stored = {key: float(value) for key, value in tensors_of(out).items() if key.endswith("input_scale")}
    assert stored == pytest.approx(static)
    assert all(("one calibrated" in str(module.inputs)) == (module.scheme == "FP8") for module in rounded)


def test_what_engines_fuse_shares_its_static_scales(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    quantize(str(tiny_model("llama")), RECIPES["FP8"], tmp_path / "out", CPU)
    tensors = tensors_of(tmp_path / "out")
    for kind in ("input_scale", "weight_scale"):
        for block, names in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            scales = {float(tensors[f"model.layers.0.{block}.{name}_proj.{kind}"]) for name in names}
            assert len(scales) == 1


def test_smoothing_and_gptq_lose_less_than_rounding_to_the_nearest(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    losses = [
        quantize(
            str(tiny_model("llama")), RECIPES[name], tmp_path / name.replace(" ", ""), CPU
        ).quality.mean_kld
        for name in ("W8A8", "W8A8 nearest")
    ]
    assert losses[0] < losses[1]


@pytest.mark.parametrize(
    ("family", "rule", "words"),
    [
        ("qwen2", {"match": "*", "scheme": "W8A8", "group_size": 64}, "one scale a channel or tensor; leave group"),
        ("qwen2", {"match": "lm_head", "scheme": "W8A8"}, "rounds what lm_head reads, which quality is not"),
        ("qwen3_moe", {"match": "*", "scheme": "FP8"}, r"routed experts \(.*\): .* largest of their scales; give"),
        ("qwen3_moe", {"match": "*", "scheme": "W4A16_ASYM", "group_size": 32}, "symmetric schemes only; give them"),
    ],
    ids=["a group size", "the head", "static experts", "asymmetric experts"],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    tiny_model: Callable[[str], Path], family: str, rule: dict[str, object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        quantize(str(tiny_model(family)), recipe_with(rule), tmp_path / "out", CPU)
    assert not (tmp_path / "out").exists()


def test_a_cache_that_is_rounded_is_no_linear_whose_inputs_are(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    rule = {"match": "*.down_proj", "scheme": "W8A8", "methods": ["rtn"]}
    quantize(str(tiny_model("llama")), recipe_with(rule, kv_cache={"dtype": "fp8"}), tmp_path / "out", CPU)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert round_inputs(model) == model.config.num_hidden_layers


def test_a_rounding_that_is_not_known_is_left_to_its_library_with_a_warning(
    tiny_model: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantize(str(tiny_model("llama")), RECIPES["W8A8 nearest"], tmp_path / "out", CPU)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    linear = model.model.layers[0].mlp.down_proj
    scheme = linear.quantization_scheme.model_copy(deep=True)
    scheme.input_activations.symmetric = False
    linear.quantization_scheme = scheme
    logging.getLogger("lowbit").propagate = True
    caplog.set_level(logging.WARNING, logger="lowbit")
    assert round_inputs(model) == 7 * model.config.num_hidden_layers - 1
    assert "1 linears round what they read in a way that is left to compressed-tensors" in caplog.text
