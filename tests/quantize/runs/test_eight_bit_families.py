"""Three families in eight bits: opened again, as large as forecast, and saying in transformers what the walk says.

The models were taught four sentences (tests/tiny_models.py), so that their choices are logits apart. Plain transformers
rounds int8 inputs a little otherwise than engines and the walk do (by absmax / 127.5), and FP8 ones alike.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from benchmarks.schemes.agreement import compared, rounded
from tests.e2e.greedy import NEW_TOKENS, PROMPTS, reference
from tests.quantize.small_runs import CPU, recipe_with, stored_bytes
from tests.tiny_models import SENTENCES, write_tiny_model

from lowbit_quantize.check.preflight import dry_run
from lowbit_quantize.pipeline import quantize

NEAR_TIE = 0.5  # logits; the models' own choices are 7 apart


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(
        lambda family: write_tiny_model(tmp_path_factory.mktemp(family), family, sentences=SENTENCES)
    )


@pytest.mark.parametrize(
    ("scheme", "methods"), [("W8A8", ["smoothquant", "gptq"]), ("FP8_DYNAMIC", ["rtn"])], ids=["W8A8", "FP8"]
)
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "phi3"])
def test_transformers_says_what_the_walk_says_and_the_forecast_is_the_files(
    taught: Callable[[str], Path], family: str, scheme: str, methods: list[str], tmp_path: Path
) -> None:
    base, out = taught(family), tmp_path / "out"
    recipe = recipe_with({"match": "*", "scheme": scheme, "methods": methods})
    manifest = quantize(str(base), recipe, out, CPU)  # which transformers opens at its end
    assert manifest.unopened == []
    assert (
        dry_run(str(base), recipe, 24.0, 1 << 30)["tensor_bytes"] == manifest.size.bytes == stored_bytes(out)
    )
    texts = reference(out)["texts"]
    walked = compared(rounded(out), PROMPTS.tolist(), texts)
    assert walked["tokens"] == len(PROMPTS) * NEW_TOKENS
    assert walked["largest_gap"] < NEAR_TIE
    right = torch.tensor(texts) == SENTENCES[:, PROMPTS.shape[1] :]
    assert right.float().mean() > 0.9  # sentences, not noise that happens to agree
