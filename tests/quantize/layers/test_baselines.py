"""What quality is held against: the noise floor, and the FP8 cache by itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantize.small_runs import CPU, PLAIN_CACHE, PLAIN_WEIGHTS, pruning
from tests.quantize.small_runs import recipe_of as without_isolation
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit_core.manifest import MANIFEST_NAME
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.quality.dataset import load_texts
from lowbit_quantize.recipe import Recipe
from lowbit_quantize.run.companions import CARD
from lowbit_quantize.walk.baselines import FLOAT32, FP8_CACHE, SEQUENCES, baseline_sequences


def recipe_of(name: str, *overrides: str) -> Recipe:
    return without_isolation(name, "quality.isolate=true", *overrides)


@pytest.mark.parametrize("family", ["phi3", "gemma3_text", "qwen2_moe", "deepseek_v2"])
def test_the_noise_floor_is_what_plain_transformers_shows_between_float32_and_the_serving_dtype(
    tiny_model: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    """Not to the last digit: torch's float32 and bfloat16 products differ in their order from batch to batch."""
    model, recipe = tiny_model(family), recipe_of("awq-g64", *PLAIN_WEIGHTS, PLAIN_CACHE)
    manifest = quantize(str(model), recipe, tmp_path / "out", CPU)
    text = load_texts(recipe.calibration, recipe.quality, AutoTokenizer.from_pretrained(model), 512)[1]
    ids = text.ids[baseline_sequences(text.domains, fp8_cache=False)[FLOAT32]]
    p, q = (_log_probabilities(model, ids, dtype) for dtype in (torch.float32, torch.bfloat16))
    floor = manifest.quality.noise_floor
    assert floor is not None
    assert floor.sequences == SEQUENCES[FLOAT32]
    assert floor.mean_kld == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.1)
    assert floor.mean_kld > 0
    assert manifest.quality.kv_cache_alone is None


def _log_probabilities(model: Path, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Of a model in `dtype`, its head in float32."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    with torch.inference_mode():
        states = loaded.model(ids).last_hidden_state[:, :-1].double()
        return torch.log_softmax(states @ loaded.lm_head.weight.double().T, -1)


def test_the_fp8_cache_alone_is_all_there_is_where_no_weight_is_quantized(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    quality = quantize(
        str(tiny_model("qwen3")), recipe_of("awq-g64", *PLAIN_WEIGHTS), tmp_path / "out", CPU
    ).quality
    assert quality.kv_cache_alone is not None
    assert quality.kv_cache_alone.sequences == quality.heldout.num_samples == SEQUENCES[FP8_CACHE]
    assert quality.kv_cache_alone.mean_kld == quality.mean_kld > 0
    assert quality.kv_cache_alone.kld_max == quality.kld_max


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_fp8_cache_alone_does_not_depend_on_what_is_done_to_the_weights(
    tiny_model: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    """Only its scales do, a little: they are seen on the compressed model's text."""
    changes = {"none": PLAIN_WEIGHTS, "awq": ()}
    if family == "qwen3_moe":
        changes["pruned"] = (pruning(prune_ratio=0.5),)
    found = {}
    for name, overrides in changes.items():
        quality = quantize(
            str(tiny_model(family)), recipe_of("awq-g64", *overrides), tmp_path / name, CPU
        ).quality
        assert quality.kv_cache_alone is not None
        found[name] = quality.kv_cache_alone.mean_kld
    assert list(found.values()) == pytest.approx([found["none"]] * len(found), rel=0.25)


def test_without_isolation_the_checkpoint_is_the_same(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = str(tiny_model("llama"))
    both = quantize(model, recipe_of("rtn-g64"), tmp_path / "both", CPU)
    neither = quantize(model, without_isolation("rtn-g64"), tmp_path / "neither", CPU)
    assert both.quality.noise_floor is not None
    assert neither.quality.noise_floor is None
    assert neither.quality.kv_cache_alone is None
    assert neither.quality.mean_kld == both.quality.mean_kld
    figures = {CARD}  # says what was measured
    assert {name for name in both.files if neither.files[name] != both.files[name]} == figures
    assert neither.files.keys() == both.files.keys()


def test_baselines_take_domains_in_turn() -> None:
    domains = ["code"] * 5 + ["maths"] * 5 + ["prose"] * 5
    rows = baseline_sequences(domains, fp8_cache=True)
    assert rows == {FLOAT32: [0, 1, 5, 10], FP8_CACHE: [0, 1, 2, 5, 6, 7, 10, 11]}
    assert baseline_sequences(["all"] * 2, fp8_cache=True) == {FLOAT32: [0, 1], FP8_CACHE: [0, 1]}
    assert set(baseline_sequences(domains, fp8_cache=False)) == {FLOAT32}


def test_a_checkpoint_whose_recipe_knows_no_isolation_is_the_same_run(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model, path = str(tiny_model("llama")), tmp_path / MANIFEST_NAME
    quantize(model, recipe_of("rtn-g64"), tmp_path, CPU)
    older = json.loads(path.read_text())
    del older["recipe"]["quality"]["isolate"]
    path.write_text(json.dumps(older))
    again = quantize(model, recipe_of("rtn-g64"), tmp_path, CPU)
    assert "isolate" not in again.recipe["quality"]  # reused as it was
