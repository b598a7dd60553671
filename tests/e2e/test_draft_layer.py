"""A draft layer survives: vLLM drafts with it as before, and the text is what it is without drafts."""

from pathlib import Path

import pytest
import torch
from tests.e2e.draft_layer import write_drafting_model
from tests.e2e.test_families import PLAIN_EXPERTS, SMALL, greedy
from tests.quantize.small_runs import tensors_of

from lowbit_quantize.pipeline import quantize
from lowbit_quantize.recipe import load_recipe

pytestmark = pytest.mark.engine

DRAFT = "model.layers.3."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drafting_model(tmp_path_factory.mktemp("draft") / "base")


@pytest.fixture(scope="module")
def quantized(base: Path) -> Path:
    out = base.parent / "quantized"
    quantize(str(base), load_recipe("awq-g64", (*SMALL, PLAIN_EXPERTS)), out, torch.device("cpu"))
    return out


def test_its_tensors_are_the_same_to_the_last_bit_under_the_names_that_vllm_asks_for(
    base: Path, quantized: Path
) -> None:
    before, after = tensors_of(base), tensors_of(quantized)
    names = {name for name in before if name.startswith(DRAFT)}
    assert {f"{DRAFT}eh_proj.weight", f"{DRAFT}mlp.experts.7.down_proj.weight"} <= names
    assert all(torch.equal(before[name], after[name]) for name in names)
    assert names == {name for name in after if name.startswith(DRAFT)}


def test_vllm_drafts_with_it_as_often_right_as_before_and_says_the_same_as_without(
    base: Path, quantized: Path
) -> None:
    plain = greedy("engine", [quantized])[str(quantized)]
    drafted = greedy("drafted", [base, quantized])
    rates = {name: found["accepted"] / found["draft"] for name, found in drafted.items()}
    print(f"drafts accepted: {rates[str(base)]:.2f} of the base's, {rates[str(quantized)]:.2f} after")
    assert drafted[str(quantized)]["texts"] == plain["texts"]
    assert rates[str(base)] > 0.5
    assert rates[str(quantized)] > 0.9 * rates[str(base)]
