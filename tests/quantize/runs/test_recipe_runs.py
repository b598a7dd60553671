"""Every recipe that ships runs on a model that it is for."""

from pathlib import Path
from typing import Any

import pytest
from tests.quantize.small_runs import CPU, recipe_of
from tests.tiny_models import write_tiny_model

from lowbit_core.manifest_files import verify_files
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.recipe import bundled_recipes, load_recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense model and one with experts, of two layers, whose widths 128 divides."""
    directory = tmp_path_factory.mktemp("models")
    dense = write_tiny_model(directory / "dense", "llama", intermediate_size=256, num_hidden_layers=2)
    sizes: dict[str, Any] = {"intermediate_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2}
    return dense, write_tiny_model(directory / "routed", "qwen3_moe", **sizes)


@pytest.mark.parametrize("name", list(bundled_recipes()))
def test_a_bundled_recipe_runs(models: tuple[Path, Path], name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    pruning = next((step for step in recipe.passes if step.name == "prune_experts"), None)
    routed = pruning is not None or "experts" in name
    manifest = quantize(str(models[routed]), recipe_of(name), tmp_path / "out", CPU)
    verify_files(tmp_path / "out", manifest, hashes=True)
    assert manifest.gate.accepted
    assert (manifest.kv_cache is not None) == (recipe.kv_cache.dtype == "fp8")
    quantized = {module.name for module in manifest.modules}
    assert bool(quantized) == bool(recipe.modules)
    if routed:
        assert manifest.experts is not None
        ratio = pruning.options["prune_ratio"] if pruning else 0
        assert manifest.experts.kept == round(8 * (1 - ratio))
        experts = any(".experts." in name for name in quantized)
        assert experts == (bool(recipe.modules) and "plain" not in name)
