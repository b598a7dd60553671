"""Shallower models: which layers go, what plain transformers makes of the rest, and what no configuration can say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantize.small_runs import (
    CPU,
    calibration_ids,
    mean_kld,
    recipe_with,
    reloaded_kld,
    stored_bytes,
    tensors_of,
)
from tests.tiny_models import write_tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowbit_core.errors import RecipeError
from lowbit_quantize.check.forecast import kv_bytes_per_token, tensor_bytes
from lowbit_quantize.check.weights import base_of
from lowbit_quantize.depth.choice import kept_layers
from lowbit_quantize.model.decoder import Decoder
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.model.weights import WeightFiles
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.plan import make_plan
from lowbit_quantize.recipe import Recipe

RULE = {"match": "*", "scheme": "W4A16", "group_size": 64, "methods": ["awq", "gptq"]}


def dropping(*rules: dict[str, Any], cache: str = "none", **options: Any) -> Recipe:
    passes: list[Any] = [{"drop_layers": options}]
    return recipe_with(*rules, passes=[*passes, "quantize"] if rules else passes, kv_cache={"dtype": cache})


def decoder_of(model: Path) -> tuple[Decoder, Recipe]:
    recipe = recipe_with(passes=[])
    plan = make_plan(find_model(str(model)), recipe)
    weights = base_of(plan, WeightFiles(model)).weights
    return Decoder(plan.base.config, plan.architecture, weights, CPU, plan.skeleton, plan.dtype), recipe


def without(model: Path, gone: set[int]) -> Any:
    """Plain transformers' model, whose other layers run one after the other."""
    found: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    layers = found.model.layers
    found.model.layers = nn.ModuleList(layer for number, layer in enumerate(layers) if number not in gone)
    found.config.num_hidden_layers = len(found.model.layers)
    found.config.use_cache = False
    return found


@pytest.mark.parametrize(
    ("family", "gone"),
    [
        ("llama", [1]), ("mistral", [0]), ("qwen2", [2]), ("qwen3", [1, 2]), ("phi3", [1]), ("gemma3_text", [0]),
        ("gemma3_text", [1]), ("olmo2", [1]), ("qwen3_moe", [0]), ("qwen3_moe", [1]), ("deepseek_v2", [0]),
        ("deepseek_v2", [2]), ("mixtral", [1]), ("glm4_moe", [0]), ("glm4_moe", [1]), ("qwen3_next", [1]),
        ("granitemoehybrid", [0]), ("lfm2", [0]), ("nemotron_h", [2, 3]), ("qwen3_5_text", [0]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rules", [(), (RULE,)])
def test_what_is_left_is_what_transformers_opens_with_the_kl_that_was_measured(
    tiny_model: Callable[[str], Path], family: str, gone: list[int], rules: tuple[Any, ...], tmp_path: Path
) -> None:
    recipe, model = dropping(*rules, layers=gone), tiny_model(family)
    manifest = quantize(str(model), recipe, tmp_path / "out", CPU)
    depth = len(make_plan(find_model(str(model)), recipe_with(passes=[])).architecture.kinds)
    assert manifest.structure is not None
    assert manifest.structure.kept_layers == [number for number in range(depth) if number not in gone]
    assert manifest.size.bytes == tensor_bytes(make_plan(find_model(str(model)), recipe))
    assert manifest.size.bytes == stored_bytes(tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").num_hidden_layers == depth - len(gone)
    assert reloaded_kld(model, tmp_path / "out", recipe) == pytest.approx(
        manifest.quality.mean_kld, rel=0.02, abs=2e-3
    )
    assert manifest.quality.mean_kld > 1e-3


def test_tensors_are_those_of_the_layers_that_stay_by_new_numbers(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    quantize(str(model), dropping(layers=[1]), tmp_path / "out", CPU)
    before, after = tensors_of(model), tensors_of(tmp_path / "out")
    for here, number in enumerate((0, 2)):
        mine = {name for name in after if name.startswith(f"model.layers.{here}.")}
        assert len(mine) == sum(name.startswith(f"model.layers.{number}.") for name in before)
        for name in mine:
            assert torch.equal(after[name], before[name.replace(f"layers.{here}.", f"layers.{number}.")])
    assert not any(name.startswith("model.layers.2.") for name in after)


def test_every_list_of_the_configuration_that_speaks_of_layers_loses_those_that_go(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    quantize(str(tiny_model("gemma3_text")), dropping(layers=[0]), tmp_path / "gemma", CPU)
    assert json.loads((tmp_path / "gemma" / "config.json").read_text())["layer_types"] == [
        "full_attention", "sliding_attention",
    ]  # fmt: skip
    quantize(str(tiny_model("deepseek_v2")), dropping(layers=[0]), tmp_path / "deepseek", CPU)
    assert json.loads((tmp_path / "deepseek" / "config.json").read_text())["first_k_dense_replace"] == 0
    quantize(str(tiny_model("qwen3_moe")), dropping(layers=[1]), tmp_path / "qwen", CPU)
    assert json.loads((tmp_path / "qwen" / "config.json").read_text())["mlp_only_layers"] == [0]


def test_a_cache_has_scales_for_the_layers_that_stay_and_the_forecast_counts_them(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model("gemma3_text")
    recipe = dropping(RULE, cache="fp8", layers=[1])
    manifest = quantize(str(model), recipe, tmp_path / "out", CPU)
    assert manifest.kv_cache is not None
    assert [one.layer for one in manifest.kv_cache.layers] == [0, 1]
    plan = make_plan(find_model(str(model)), recipe)
    whole = make_plan(find_model(str(model)), recipe_with(RULE, kv_cache={"dtype": "fp8"}))
    assert kv_bytes_per_token(plan, 1) * 3 == kv_bytes_per_token(whole, 1) * 2
    assert manifest.size.bytes == tensor_bytes(plan)


def test_greedy_finds_the_layer_without_which_the_model_of_transformers_is_nearest(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "base", "llama", num_hidden_layers=5)
    decoder, recipe = decoder_of(model)
    ids = calibration_ids(model, recipe)[:4]
    kept, scores = kept_layers(decoder, ids, 2, "measured", 0)
    whole = without(model, set())
    slow = {number: mean_kld(whole, without(model, {number}), ids) for number in range(5)}
    assert scores == pytest.approx(slow, rel=0.05)
    first = min(slow, key=lambda number: slow[number])
    second = min(
        set(range(5)) - {first}, key=lambda number: mean_kld(whole, without(model, {first, number}), ids)
    )
    assert set(range(5)) - set(kept) == {first, second}


def test_block_influence_is_one_minus_the_cosine_of_what_a_layer_reads_and_gives(
    tiny_model: Callable[[str], Path],
) -> None:
    model = tiny_model("qwen3")
    decoder, recipe = decoder_of(model)
    ids = calibration_ids(model, recipe)[:3]
    kept, scores = kept_layers(decoder, ids, 1, "block-influence", 0)
    whole = without(model, set())
    whole.model.norm = nn.Identity()
    with torch.inference_mode():
        states = whole.model(ids, output_hidden_states=True).hidden_states
    slow = {
        number: 1
        - float(torch.cosine_similarity(states[number].float(), states[number + 1].float(), dim=-1).mean())
        for number in range(3)
    }
    assert scores == pytest.approx(slow, abs=5e-3)
    assert set(range(3)) - set(kept) == {min(slow, key=lambda number: slow[number])}


def test_the_predicted_loss_of_a_layer_that_adds_little_is_near_the_measured_one(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "base", "llama", num_hidden_layers=4)
    from safetensors.torch import load_file, save_file

    path = model / "model.safetensors"
    tensors = load_file(path)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.2.{name}.weight"] *= 0.02
    save_file(tensors, path, metadata={"format": "pt"})
    decoder, recipe = decoder_of(model)
    ids = calibration_ids(model, recipe)
    kept, scores = kept_layers(decoder, ids, 1, "predicted", 0)
    assert kept == (0, 1, 3)
    measured = kept_layers(decoder, ids, 1, "measured", 0)[1][2]
    assert scores[2] == pytest.approx(measured, rel=0.5)


def test_a_layer_that_was_chosen_is_the_same_model_as_one_that_was_named(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model("qwen3_moe")
    chosen = quantize(str(model), dropping(count=1, criterion="measured"), tmp_path / "chosen", CPU)
    assert chosen.structure is not None
    assert chosen.structure.layer_criterion == "measured"
    assert len(chosen.structure.layer_scores) == 3
    gone = sorted(set(range(3)) - set(chosen.structure.kept_layers))
    named = quantize(str(model), dropping(layers=gone), tmp_path / "named", CPU)
    assert named.quality.mean_kld == chosen.quality.mean_kld
    first, second = tensors_of(tmp_path / "chosen"), tensors_of(tmp_path / "named")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_fewer_layers_and_narrower_ones_go_together(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    passes: list[Any] = [
        {"drop_layers": {"layers": [1]}},
        {"prune_width": {"mlp_channels": 128, "kv_groups": 1}},
    ]
    recipe, model = recipe_with(RULE, passes=[*passes, "quantize"]), tiny_model("llama")
    manifest = quantize(str(model), recipe, tmp_path / "out", CPU)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.num_hidden_layers, config.intermediate_size, config.num_key_value_heads) == (2, 128, 1)
    assert reloaded_kld(model, tmp_path / "out", recipe) == pytest.approx(
        manifest.quality.mean_kld, rel=0.02, abs=2e-3
    )
    assert str(manifest.structure) == (
        "2 of 3 layers, without 1; intermediate_size 192 to 128, num_key_value_heads 2 to 1 by brain-surgeon"
    )


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", {}, "give ratio, the share of layers that goes, count"),
        ("llama", {"count": 1, "ratio": 0.3}, "give ratio, the share of layers that goes, count"),
        ("llama", {"count": 3}, "drops 3 of 3 layers; allowed are 1 to 2"),
        ("llama", {"ratio": 0.9}, "drops 3 of 3 layers"),
        ("llama", {"layers": [3]}, "has layers 0 to 2; 3 is none of them"),
        ("llama", {"layers": [1, 1]}, "a number twice"),
        ("llama", {"count": 1, "part": "attention"}, "its configuration cannot say that one has none"),
        ("gemma3n_text", {"count": 1}, "called with more than hidden states"),
        ("granitemoehybrid", {"layers": [1]}, "no layer with attention would be left"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tiny_model: Callable[[str], Path], family: str, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words) as refused:
        quantize(str(tiny_model(family)), dropping(**options), tmp_path / "out", CPU)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"layers": [0]}, {"count": 1}])
def test_a_pattern_that_counts_layers_by_itself_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "base", "qwen3_moe", num_hidden_layers=4, decoder_sparse_step=2)
    with pytest.raises(RecipeError, match=r"would make of layer . another one") as refused:
        quantize(str(model), dropping(**options), tmp_path / "out", CPU)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
