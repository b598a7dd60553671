"""Recipes are strict."""

from pathlib import Path

import pytest

from lowbit_core.errors import RecipeError
from lowbit_quantize.recipe import Recipe, bundled_recipes, load_recipe


@pytest.mark.parametrize("name", list(bundled_recipes()))
def test_every_bundled_recipe_loads(name: str) -> None:
    assert load_recipe(name).description


def test_overrides_reach_into_sections() -> None:
    recipe = load_recipe("awq", ("weights.group_size=64", "quality.max_mean_kld=0.2", "kv_cache.dtype=none"))
    assert (recipe.weights.group_size, recipe.quality.max_mean_kld, recipe.kv_cache.dtype) == (
        64,
        0.2,
        "none",
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "weights.bit=4",
            r"unknown key 'weights.bit'; allowed here: method, bits, group_size, symmetric, ignore",
        ),
        (
            "wights.bits=4",
            "unknown key 'wights'; allowed here: description, format, weights, experts, kv_cache, calibration",
        ),
        ("weights.bits=5", r"weights.bits = 5"),
        ("weights.group_size=48", r"weights.group_size = 48.*allowed are channel and the multiples of 32"),
        ("weights.group_size=row", r"weights.group_size = 'row'"),
        ("weights.method=magic", r"weights.method = 'magic'.*'awq'"),
        ("quality.max_mean_kld=-1", r"quality.max_mean_kld = -1"),
        ("weights.bits", r"is not key=value"),
        ("description.x=1", r"description is a value"),
    ],
)
def test_a_wrong_key_or_value_is_refused_with_its_path(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("awq", (override,))


@pytest.mark.parametrize("content", ["- a\n- b\n", "weights: [1\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(RecipeError):
        load_recipe(str(tmp_path / "r.yaml"))


def test_an_unknown_recipe_name_lists_the_bundled_ones() -> None:
    with pytest.raises(
        RecipeError,
        match="awq, awq-g64, awq-g64-autoawq, awq-g64-plain-experts, awq-gptq-g64, gptq, gptq-g64, ",
    ):
        load_recipe("awqq")


def test_an_empty_recipe_is_the_default() -> None:
    assert Recipe() == Recipe.model_validate({})
