"""Families whose layers are called with more than hidden states, from the recipe to the reloaded checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.quantize.layers.test_decoder import decoder_of
from tests.quantize.small_runs import CPU, heldout_ids, mean_kld, recipe_with

from lowbit_evaluate.loaded_model import load_model
from lowbit_quantize.check.forecast import stream_width
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.plan import make_plan

W4 = {"match": "*", "scheme": "W4A16", "group_size": 32}
RECIPES: dict[str, dict[str, Any]] = {
    "gptq": {**W4, "methods": ["gptq"]},
    "awq+gptq": {**W4, "methods": ["awq", "gptq"]},
    "W8A8": {"match": "*", "scheme": "W8A8", "methods": ["smoothquant", "gptq"]},
}
# Nats between the walk's mean KL and the reloaded model's; rounded inputs are bfloat16's in transformers.
NEAR = {"gptq": 0.004, "awq+gptq": 0.004, "W8A8": 0.01}


def reloaded(base: Path, checkpoint: Path, recipe: Any) -> float:
    before, after = (load_model(find_model(str(place)), CPU).model for place in (base, checkpoint))
    return mean_kld(before, after, heldout_ids(base, recipe))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gemma3n_text", "gptq"),
        ("gemma3n_text", "W8A8"),
        ("gemma4_text", "awq+gptq"),
        ("gemma4_text", "W8A8"),
        ("bloom", "gptq"),
    ],
)
def test_a_checkpoint_reloads_to_what_the_walk_measured(
    tiny_model: Callable[[str], Path], family: str, name: str, tmp_path: Path
) -> None:
    recipe = recipe_with(RECIPES[name])
    manifest = quantize(str(tiny_model(family)), recipe, tmp_path / "out", CPU)
    again = reloaded(tiny_model(family), tmp_path / "out", recipe)
    assert manifest.quality.mean_kld > 0
    assert again == pytest.approx(manifest.quality.mean_kld, abs=NEAR[name])


@pytest.mark.parametrize("family", ["llama", "gemma3n_text", "gemma4_text", "bloom"])
def test_streams_are_as_wide_as_was_forecast(tiny_model: Callable[[str], Path], family: str) -> None:
    decoder = decoder_of(tiny_model(family))
    plan = make_plan(find_model(str(tiny_model(family))), recipe_with(RECIPES["gptq"]))
    small = 4 * 16 + 4  # what chooses between gemma3n's copies reaches its keys too
    assert decoder.width <= stream_width(plan) <= decoder.width + small * (family == "gemma3n_text") * 2
