"""Narrower models: what is cut, what plain transformers makes of it, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantize.small_runs import CPU, recipe_with, reloaded_kld, stored_bytes, tensors_of
from tests.tiny_models import write_tiny_model
from transformers import AutoConfig

from lowbit_core.errors import RecipeError
from lowbit_quantize.check.forecast import tensor_bytes
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.plan import make_plan
from lowbit_quantize.recipe import Recipe

RULE = {"match": "*", "scheme": "W4A16", "group_size": 64, "methods": ["awq", "gptq"]}


def narrowing(*rules: dict[str, Any], **options: Any) -> Recipe:
    passes: list[Any] = [{"prune_width": options}]
    return recipe_with(*rules, passes=[*passes, "quantize"] if rules else passes)


FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma3_text",
    "olmo2",
    "glm4_moe",
    "qwen3_moe",
    "nemotron_h",
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rules", [(), (RULE,)])
def test_narrower_networks_are_what_transformers_opens_with_the_kl_that_was_measured(
    tiny_model: Callable[[str], Path], family: str, rules: tuple[dict[str, Any], ...], tmp_path: Path
) -> None:
    recipe, model = narrowing(*rules, mlp_ratio=0.33), tiny_model(family)
    manifest = quantize(str(model), recipe, tmp_path / "out", CPU)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.intermediate_size == 128
    assert tensor_bytes(make_plan(find_model(str(model)), recipe)) == manifest.size.bytes
    assert manifest.size.bytes == stored_bytes(tmp_path / "out")
    assert reloaded_kld(model, tmp_path / "out", recipe) == pytest.approx(
        manifest.quality.mean_kld, rel=0.02, abs=2e-3
    )
    assert manifest.quality.mean_kld > 1e-4


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen3", "phi3", "gemma3_text", "mixtral", "qwen3_moe"]
)
def test_a_group_of_heads_less_is_what_transformers_opens(
    tiny_model: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    recipe, model = narrowing(kv_groups=1), tiny_model(family)
    manifest = quantize(str(model), recipe, tmp_path / "out", CPU)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.num_key_value_heads, config.num_attention_heads, config.head_dim) == (1, 2, 32)
    assert reloaded_kld(model, tmp_path / "out", recipe) == pytest.approx(
        manifest.quality.mean_kld, rel=0.02, abs=2e-3
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "deepseek_v2", "glm4_moe"])
@pytest.mark.parametrize("rules", [(), (RULE,)])
def test_narrower_experts_are_what_transformers_opens(
    tiny_model: Callable[[str], Path], family: str, rules: tuple[dict[str, Any], ...], tmp_path: Path
) -> None:
    model = tiny_model(family)
    if family not in ("mixtral", "olmoe"):
        model = write_tiny_model(tmp_path / "wide", family, moe_intermediate_size=128)
    recipe = narrowing(*rules, expert_ratio=0.4)
    manifest = quantize(str(model), recipe, tmp_path / "out", CPU)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    width = config.intermediate_size if family in ("mixtral", "olmoe") else config.moe_intermediate_size
    assert width == (128 if family in ("mixtral", "olmoe") else 64)
    assert tensor_bytes(make_plan(find_model(str(model)), recipe)) == manifest.size.bytes
    assert reloaded_kld(model, tmp_path / "out", recipe) == pytest.approx(
        manifest.quality.mean_kld, rel=0.02, abs=2e-3
    )


@pytest.mark.parametrize("turned", [False, True])
def test_fewer_experts_and_narrower_ones_go_together(
    tiny_model: Callable[[str], Path], turned: bool, tmp_path: Path
) -> None:
    steps: list[Any] = [{"prune_experts": {"keep_experts": 4}}, {"prune_width": {"expert_channels": 128}}]
    recipe = recipe_with(RULE, passes=[*(reversed(steps) if turned else steps), "quantize"])
    model = tiny_model("mixtral")
    manifest = quantize(str(model), recipe, tmp_path / "out", CPU)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.num_local_experts, config.intermediate_size) == (4, 128)
    assert tensor_bytes(make_plan(find_model(str(model)), recipe)) == manifest.size.bytes
    assert reloaded_kld(model, tmp_path / "out", recipe) == pytest.approx(
        manifest.quality.mean_kld, rel=0.02, abs=2e-3
    )


def test_rows_and_columns_that_stay_belong_together(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    quantize(str(model), narrowing(mlp_channels=128, criterion="wanda-sp"), tmp_path / "out", CPU)
    before, after = tensors_of(model), tensors_of(tmp_path / "out")
    for layer in range(3):
        mlp = f"model.layers.{layer}.mlp"
        rows = [
            int((before[f"{mlp}.gate_proj.weight"] == row).all(1).nonzero()[0, 0])
            for row in after[f"{mlp}.gate_proj.weight"]
        ]
        assert rows == sorted(set(rows))
        assert len(rows) == 128
        assert torch.equal(after[f"{mlp}.up_proj.weight"], before[f"{mlp}.up_proj.weight"][rows])
        assert torch.equal(after[f"{mlp}.down_proj.weight"], before[f"{mlp}.down_proj.weight"][:, rows])


def test_brain_surgeon_loses_less_than_every_control(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lost = {
        criterion: quantize(
            str(tiny_model("llama")),
            narrowing(mlp_ratio=0.33, criterion=criterion),
            tmp_path / criterion,
            CPU,
        ).quality.mean_kld
        for criterion in ("brain-surgeon", "wanda-sp", "flap", "random")
    }
    assert min(lost, key=lambda name: lost[name]) == "brain-surgeon"


@pytest.mark.parametrize("rules", [(), (RULE,)])
def test_biases_that_a_configuration_can_say_make_up_for_means_and_are_loaded(
    tiny_model: Callable[[str], Path], rules: tuple[dict[str, Any], ...], tmp_path: Path
) -> None:
    model, sizes = tiny_model("llama"), {"mlp_ratio": 0.33, "kv_groups": 1}
    recipe = narrowing(*rules, **sizes, biases=True)
    manifest = quantize(str(model), recipe, tmp_path / "out", CPU)
    after = tensors_of(tmp_path / "out")
    assert float(after["model.layers.1.mlp.down_proj.bias"].abs().max()) > 0
    assert float(after["model.layers.1.self_attn.o_proj.bias"].abs().max()) > 0
    assert float(after["model.layers.1.mlp.up_proj.bias"].abs().max()) == 0
    assert reloaded_kld(model, tmp_path / "out", recipe) == pytest.approx(
        manifest.quality.mean_kld, rel=0.02, abs=2e-3
    )
    if not rules:
        plain = quantize(str(model), narrowing(**sizes), tmp_path / "plain", CPU)
        errors, without = (
            sum(sum(one.values()) for one in found.figures.values()) for found in (manifest, plain)
        )
        assert errors < without


def test_an_fp8_cache_has_scales_for_the_heads_that_stay(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    data = narrowing(kv_groups=1, mlp_channels=128).model_dump()
    recipe = Recipe.model_validate(data | {"kv_cache": {"dtype": "fp8"}})
    manifest = quantize(str(tiny_model("llama")), recipe, tmp_path / "out", CPU)
    assert manifest.kv_cache is not None
    assert len(manifest.kv_cache.layers) == 3
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_key_value_heads"] == 1


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", {}, "nothing is asked for; give one or more of mlp_ratio, mlp_channels"),
        ("llama", {"mlp_ratio": 0.5, "mlp_channels": 64}, "give mlp_ratio, the share"),
        ("llama", {"mlp_channels": 100}, "of 192 channels, multiples of 64 may stay.*nearest are 64 and 128"),
        (
            "llama",
            {"mlp_ratio": 0.5, "tensor_parallel": 4},
            "networks of 192 channels cannot become narrower",
        ),
        ("llama", {"kv_groups": 0}, "kv_groups = 0: allowed is 1 or more"),
        ("llama", {"kv_groups": 2}, "kv_groups = 2 of 2 key and value heads.*allowed are 1"),
        ("llama", {"expert_ratio": 0.5}, "no layer .* networks are asked for by mlp_"),
        ("mixtral", {"mlp_ratio": 0.5}, "no layer .* routed experts by expert_"),
        ("qwen2", {"kv_groups": 1}, "not known to read head_dim"),
        ("olmo2", {"kv_groups": 1}, "not known to read head_dim"),
        ("deepseek_v2", {"kv_groups": 1}, "attention caches a latent"),
        ("qwen2", {"mlp_ratio": 0.33, "biases": True}, "no mlp_bias of the configuration is known to tell"),
        ("qwen3", {"kv_groups": 1, "biases": True}, "no attention_bias of the configuration is known"),
        ("bloom", {"mlp_ratio": 0.5}, "says in no single number how wide it is"),
        ("gemma3n_text", {"mlp_ratio": 0.5}, "says in no single number how wide it is"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tiny_model: Callable[[str], Path], family: str, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words) as refused:
        quantize(str(tiny_model(family)), narrowing(**options), tmp_path / "out", CPU)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_scales_of_heads_are_refused_where_heads_go(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    cache = {"dtype": "fp8", "strategy": "attn_head"}
    recipe = recipe_with(passes=[{"prune_width": {"kv_groups": 1}}], kv_cache=cache)
    with pytest.raises(RecipeError, match=r"heads are not those that stay.*give strategy: tensor"):
        quantize(str(tiny_model("llama")), recipe, tmp_path / "out", CPU)
    assert not (tmp_path / "out").exists()
