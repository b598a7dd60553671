"""benchmarks/same_bytes.py sees every difference between two checkpoints, and speaks both revisions' recipes."""

from pathlib import Path

import pytest
import torch
from benchmarks.revisions.cases import Case, tiny_cases
from benchmarks.revisions.comparison import compared
from benchmarks.revisions.pairs import Pair, Run, ratios
from benchmarks.revisions.trees import SMALL, Ended, Tree
from safetensors.torch import save_file

DONE = Ended(0, "")
BASE = {"a": torch.arange(6), "b": torch.ones(2, 3)}
OLD_RECIPE = "weights: {method: gptq}\ncalibration: {sequences: 32, sequence_tokens: 512}\nquality: {}\n"
NEW_RECIPE = "modules: [{match: '*'}]\ncalibration: {num_samples: 32, max_seq_length: 512}\nquality: {}\n"


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("tensors", "differs"),
    [
        (BASE, ()),
        ({**BASE, "b": torch.ones(2, 3) + 2**-20}, ("b: other bytes",)),
        ({**BASE, "b": torch.ones(3, 2)}, ("b: ('F32', [2, 3]) became ('F32', [3, 2])",)),
        ({**BASE, "b": torch.ones(2, 3).half()}, ("b: ('F32', [2, 3]) became ('F16', [2, 3])",)),
        ({"a": BASE["a"], "c": BASE["b"]}, ("b: only in the old", "c: only in the new")),
    ],
)
def test_a_tensor_that_differs_is_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor], differs: tuple[str, ...]
) -> None:
    result = compared("case", (DONE, DONE), saved(tmp_path / "old", BASE), saved(tmp_path / "new", tensors))
    assert result.differs == differs
    assert result.held == (not differs)


def test_only_what_both_refuse_holds_without_a_checkpoint(tmp_path: Path) -> None:
    refused, failed = Ended(2, "lowbit: error: no"), Ended("KeyError: 'a'", "")
    assert compared("case", (refused, refused), tmp_path, tmp_path).held
    for ended in ((refused, DONE), (failed, failed), (DONE, failed)):
        assert not compared("case", ended, tmp_path, tmp_path).held
    assert compared("case", (DONE, DONE), tmp_path, tmp_path).differs == ("neither holds a tensor",)


def tree(folder: Path, recipe: str, *names: str) -> Tree:
    recipes = folder / "quantize" / "recipes"
    recipes.mkdir(parents=True)
    for name in ("gptq-g64", *names):
        (recipes / f"{name}.yaml").write_text(recipe)
    return Tree("either", folder, "revision", folder)


def test_a_tree_is_given_the_keys_that_its_own_recipes_use(tmp_path: Path) -> None:
    old, new = tree(tmp_path / "old", OLD_RECIPE), tree(tmp_path / "new", NEW_RECIPE)
    assert old.spelled(SMALL)[1::2] == [setting.old for setting in SMALL]
    assert new.spelled(SMALL[:3])[1::2] == [setting.new for setting in SMALL[:3]]


def test_a_recipe_of_an_older_format_becomes_an_export_where_it_is_gone(tmp_path: Path) -> None:
    case = Case("llama", "gptq-g64-autogptq")
    old = tree(tmp_path / "old", OLD_RECIPE, "gptq-g64-autogptq")
    new = tree(tmp_path / "new", NEW_RECIPE)
    assert len(case.commands(old, Path("model"), Path("out"))) == 1
    first, export = case.commands(new, Path("model"), Path("out"))
    assert first[first.index("--recipe") + 1] == "gptq-g64"
    assert "kv_cache.dtype=none" in first
    assert export == ["export", "out-compressed-tensors", "--to", "autogptq", "--out", "out"]


def test_recipes_that_prune_are_for_mixtures(tmp_path: Path) -> None:
    cases = list(
        tiny_cases(tree(tmp_path / "old", OLD_RECIPE, "awq-g64", "reap25", "awq-g64-plain-experts", "gptq"))
    )
    assert {case.model for case in cases if "reap" in case.recipe} == {"qwen3_moe", "deepseek_v2"}
    assert {case.model for case in cases if case.recipe == "awq-g64"} > {"llama", "gemma3_text", "phi3"}


def test_ratios_are_of_pairs() -> None:
    def run(cpu_s: float) -> Run:
        return Run(cpu_s, cpu_s, 1000, 0.0)

    found = ratios([Pair(run(10), run(11)), Pair(run(20), run(18))])
    assert found["cpu_s"] == {"mean": 1.0, "standard_error": 0.1}
    assert found["peak_rss_bytes"] == {"mean": 1.0, "standard_error": 0.0}
