"""What makes two runs the same run: what decides bytes, and not how it is said or where it lies."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.quantize.small_runs import CPU, recipe_of

from lowbit_core.errors import OutputError
from lowbit_core.manifest import MANIFEST_NAME, Manifest
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.recipe import Recipe, load_recipe

RULE = "modules: [{match: '*', scheme: W4A16, group_size: 64, methods: [rtn]}]\n"
TEXTS = (
    "calibration: {dataset: DATASET, num_samples: 2, max_seq_length: 64}\n"
    "quality: {dataset: default, num_samples: 2, max_seq_length: 64, isolate: false}\n"
)
WORDS = "\n\n".join(f"paragraph {n}: one way to say it, and another. " * 20 for n in range(20))


@pytest.fixture
def run(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[[Recipe], Manifest]:
    """Run a recipe into one and the same directory."""
    return lambda recipe: quantize(str(tiny_model("llama")), recipe, tmp_path / "out", CPU)


@pytest.fixture(scope="module")
def finished(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    quantize(str(tiny_model("llama")), recipe_of("rtn-g64"), out, CPU)
    return out


@pytest.fixture
def written(tmp_path: Path) -> Callable[[], int]:
    """When the checkpoint's manifest was written."""
    return lambda: (tmp_path / "out" / MANIFEST_NAME).stat().st_mtime_ns


def recipe_in(folder: Path, dataset: str, rule: str = RULE) -> Recipe:
    folder.mkdir(exist_ok=True)
    (folder / "mine.yaml").write_text(rule + TEXTS.replace("DATASET", dataset))
    return load_recipe(str(folder / "mine.yaml"))


def test_another_description_is_the_same_run(
    run: Callable[[Recipe], Manifest], written: Callable[[], int]
) -> None:
    first = run(recipe_of("rtn-g64", "description='in one way'"))
    before = written()
    again = run(recipe_of("rtn-g64", "description='in another'"))
    assert written() == before
    assert again == first
    assert again.recipe["description"] == "in one way"  # reused as it was


def test_a_dataset_that_was_moved_is_the_same_run_and_one_that_was_changed_is_not(
    run: Callable[[Recipe], Manifest], written: Callable[[], int], tmp_path: Path
) -> None:
    """The ids decide; the recipe moves with its text, or names it by another path."""
    here, there = tmp_path / "here", tmp_path / "there"
    recipe = recipe_in(here, "mine.txt")
    (here / "mine.txt").write_text(WORDS)
    run(recipe)
    before = written()
    there.mkdir()
    shutil.move(here / "mine.txt", there / "renamed.txt")
    run(recipe_in(there, "renamed.txt"))
    run(recipe_in(here, str(there / "renamed.txt")))
    run(recipe_in(here, "../there/renamed.txt"))
    assert written() == before
    (there / "renamed.txt").write_text(WORDS.replace("one way", "a way"))
    with pytest.raises(OutputError, match=r"another model, recipe or text: calibration text; give a new"):
        run(recipe_in(there, "renamed.txt"))


def test_the_same_ids_in_another_file_are_the_same_run(
    run: Callable[[Recipe], Manifest], written: Callable[[], int], tmp_path: Path
) -> None:
    ids = json.dumps({"input_ids": [[(n * m) % 500 for m in range(1, 65)] for n in (3, 7)]})
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(ids)
    run(recipe_of("rtn-g64", f"calibration.token_ids={tmp_path}/a.json"))
    before = written()
    run(recipe_of("rtn-g64", f"calibration.token_ids={tmp_path}/b.json"))
    assert written() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("modules.0.scheme=W8A16", "recipe (modules.0.scheme W4A16, now W8A16)"),
        ("modules.0.methods=[awq]", "recipe (modules.0.methods.0 rtn, now awq)"),
        ("kv_cache.dtype=none", "recipe (kv_cache.dtype fp8, now none)"),
        ("quality.max_mean_kld=0.5", "recipe (quality.max_mean_kld None, now 0.5)"),
        ("calibration.seed=1", "recipe (calibration.seed 0, now 1)"),
    ],
)
def test_what_decides_bytes_or_the_verdict_makes_another_run(
    tiny_model: Callable[[str], Path], finished: Path, change: str, words: str
) -> None:
    with pytest.raises(OutputError) as caught:
        quantize(str(tiny_model("llama")), recipe_of("rtn-g64", change), finished, CPU)
    assert words in str(caught.value)
    assert "or give --overwrite to start over" in str(caught.value)


def test_defaults_that_are_written_out_are_the_same_run(
    run: Callable[[Recipe], Manifest], written: Callable[[], int], tmp_path: Path
) -> None:
    run(recipe_in(tmp_path / "a", "default"))
    before = written()
    spelled = RULE.replace("methods: [rtn]", "methods: rtn") + "kv_cache: {dtype: fp8}\npasses: [quantize]\n"
    run(recipe_in(tmp_path / "b", "default", spelled))
    assert written() == before
