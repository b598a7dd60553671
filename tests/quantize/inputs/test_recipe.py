"""Recipes are strict; an old key is refused with its new name; paths are where the person who wrote them means."""

from pathlib import Path

import pytest

from lowbit_core.errors import RecipeError
from lowbit_quantize.recipe import RENAMED, MethodStep, Recipe, bundled_recipes, load_recipe


@pytest.mark.parametrize("name", list(bundled_recipes()))
def test_every_bundled_recipe_loads(name: str) -> None:
    assert load_recipe(name).description


def test_overrides_reach_into_sections_and_lists() -> None:
    recipe = load_recipe(
        "awq", ("modules.0.group_size=64", "quality.max_mean_kld=0.2", "kv_cache.dtype=none")
    )
    assert (recipe.modules[0].group_size, recipe.quality.max_mean_kld) == (64, 0.2)
    assert recipe.kv_cache.dtype == "none"


def test_one_name_stands_for_a_list_of_one() -> None:
    recipe = load_recipe("awq", ("modules=[{match: '*', scheme: W8A16, methods: gptq}]",))
    assert (recipe.modules[0].match, recipe.modules[0].methods) == (
        ("*",),
        (MethodStep.model_validate("gptq"),),
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "modules.0.bit=4",
            r"unknown key 'modules.0.bit'; allowed here: match, scheme, group_size, methods",
        ),
        (
            "wights.bits=4",
            "unknown key 'wights'; allowed here: description, base, modules, kv_cache, passes, calibration, quality",
        ),
        (
            "modules.0.group_size=48",
            r"modules.0.group_size = 48: allowed are channel and the multiples of 32",
        ),
        ("modules.0.group_size=true", r"modules.0.group_size = True: allowed are channel and"),
        ("modules.0.group_size=row", r"modules.0.group_size = 'row'"),
        ("modules.0.match=[]", r"modules.0.match"),
        ("modules.0.scheme=none", r"scheme none has no groups; group_size goes with another scheme"),
        ("passes=[{quantize: {}, distill_router: {}}]", r"passes.0.*a pass is its name, or `name: \{option"),
        ("passes=[1]", r"passes.0.*a pass is its name"),
        ("kv_cache.dtype=int8", r"kv_cache.dtype = 'int8'"),
        ("quality.max_mean_kld=-1", r"quality.max_mean_kld = -1"),
        ("modules.0", r"is not key=value"),
        ("description.x=1", r"description is a value"),
        ("modules.1.group_size=64", r"'1' is none of the items 0 to 0 of the list"),
    ],
)
def test_a_wrong_key_or_value_is_refused_with_its_path(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe("awq", (override,))
    assert "\n" not in str(caught.value)


OLD_VALUES = {
    "weights.symmetric": "true",
    "weights.ignore": "[lm_head]",
    "calibration.source": "default",
    "quality.source": "default",
    "experts.criterion": "reap",
    "format": "autoawq",
}


@pytest.mark.parametrize("key", list(RENAMED))
def test_an_old_key_is_refused_with_its_new_name(key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("awq", (f"{key}={OLD_VALUES.get(key, '4')}",))
    line = str(caught.value)
    assert f"unknown key '{key}'; it is called '{RENAMED[key]}' now" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("weights: {method: gptq, bits: 4}", "methods"),
        ("experts: {prune: 0.5}", "prune_ratio"),
        ("experts: {router_distillation: true}", "distill_router"),
        ("calibration: {sequences: 8}", "calibration.num_samples"),
        ("quality: {sequence_tokens: 64}", "quality.max_seq_length"),
        ("format: autogptq", "lowbit export"),
    ],
)
def test_a_recipe_of_before_is_refused_with_what_its_first_key_is_called_now(
    tmp_path: Path, old: str, new: str
) -> None:
    (tmp_path / "old.yaml").write_text(f"description: of before\n{old}\n")
    with pytest.raises(RecipeError, match=new):
        load_recipe(str(tmp_path / "old.yaml"))


@pytest.mark.parametrize("content", ["- a\n- b\n", "modules: [1\n", "modules: []\nmodules: []\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(RecipeError):
        load_recipe(str(tmp_path / "r.yaml"))


def test_an_unknown_recipe_name_lists_the_bundled_ones() -> None:
    assert {"awq-g64", "gptq-g64", "depth20"} <= set(bundled_recipes())
    with pytest.raises(RecipeError, match=", ".join(bundled_recipes())):
        load_recipe("awqq")


def test_an_empty_recipe_is_the_default() -> None:
    assert Recipe() == Recipe.model_validate({})
    assert [step.name for step in Recipe().passes] == ["quantize"]


def test_a_recipe_is_read_back_from_what_a_manifest_holds() -> None:
    recipe = load_recipe("reap25-awq-g64")
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_a_path_in_a_file_is_relative_to_the_file_and_one_on_the_command_line_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, elsewhere = tmp_path / "recipes", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "mine.yaml").write_text(
        "calibration: {dataset: texts/mine.jsonl, num_samples: 8}\n"
        "quality: {token_ids: ids.json, dataset: 'hub:some/set'}\n"
    )
    monkeypatch.chdir(elsewhere)
    recipe = load_recipe(str(folder / "mine.yaml"))
    assert recipe.calibration.dataset == str(folder / "texts" / "mine.jsonl")
    assert recipe.quality.token_ids == str(folder / "ids.json")
    assert recipe.quality.dataset == "hub:some/set"
    recipe = load_recipe("../recipes/mine.yaml", ("calibration.dataset=texts/mine.jsonl",))
    assert recipe.calibration.dataset == "texts/mine.jsonl"
    assert Path(recipe.quality.token_ids or "").resolve() == folder / "ids.json"
    (folder / "bundled.yaml").write_text(
        f"calibration: {{dataset: default}}\nquality: {{dataset: {elsewhere}/a.txt}}\n"
    )
    recipe = load_recipe(str(folder / "bundled.yaml"))
    assert (recipe.calibration.dataset, recipe.quality.dataset) == ("default", f"{elsewhere}/a.txt")
