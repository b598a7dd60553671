"""Experts that are called with rows sorted by expert (Llama 4's): taken apart, quantized, and opened one by one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantize.small_runs import CPU, PLAIN_EXPERTS, heldout_ids, mean_kld, recipe_with, tensors_of
from tests.tiny_models import SIZES, SPECIAL, seeded_model, tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig

from lowbit_core.errors import RecipeError
from lowbit_evaluate.loaded_model import load_model
from lowbit_quantize.model.discovery.found import find_architecture
from lowbit_quantize.model.experts.linears import ExpertList, unstack_experts
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.model.skeleton import build_skeleton
from lowbit_quantize.pipeline import quantize

EXPERTS, USED = 4, 2
RULE: dict[str, Any] = {"match": "*", "scheme": "W4A16", "group_size": 32, "methods": ["gptq"]}


def config_with(**keys: Any) -> Any:
    """Two layers with experts, of which each token uses two."""
    sizes = (
        SIZES | SPECIAL | {"num_hidden_layers": 2, "num_local_experts": EXPERTS, "intermediate_size_mlp": 128}
    )
    return AutoConfig.for_model("llama4_text", **sizes, num_experts_per_tok=USED, **keys)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sorted")
    seeded_model(config_with()).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def test_experts_one_by_one_compute_what_the_sorted_stack_does_and_see_their_own_tokens_only() -> None:
    model = seeded_model(config_with()).float()
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    seen: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        expected = model(ids).logits
        (name, _) = unstack_experts(model)
        experts = model.get_submodule(name)
        experts.register_forward_pre_hook(lambda _, given: seen.append(given))
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert isinstance(experts, ExpertList)
    ((rows, chosen, gates),) = seen
    assert rows.shape == (USED * ids.numel(), SIZES["hidden_size"])
    assert (chosen.shape, gates.unique().tolist()) == ((len(rows), 1), [1.0])
    assert rows.any(-1).all()
    assert chosen.flatten().tolist() == sorted(chosen.flatten().tolist())


def test_what_is_found_of_them() -> None:
    config = config_with()
    (kind,) = set(find_architecture(config, build_skeleton(config)).kinds)
    assert (kind.experts, kind.router, kind.entrance) == (
        "feed_forward.experts",
        "feed_forward.router",
        "feed_forward.experts",
    )
    inside = {
        group.linears: group.fold and group.fold.producer for group in kind.groups if kind.is_expert(group)
    }
    every = "feed_forward.experts.*"
    assert inside[(f"{every}.down_proj",)] == f"{every}.up_proj"
    assert (f"{every}.gate_proj", f"{every}.up_proj") in inside


@pytest.mark.parametrize("rules", [(RULE,), (RULE, PLAIN_EXPERTS), (RULE | {"methods": ["awq", "gptq"]},)])
def test_a_checkpoint_has_single_experts_and_reloads_to_what_the_walk_measured(
    base: Path, tmp_path: Path, rules: tuple[dict[str, Any], ...]
) -> None:
    recipe, out = recipe_with(*rules), tmp_path / "out"
    manifest = quantize(str(base), recipe, out, CPU)
    ending = "weight" if PLAIN_EXPERTS in rules else "weight_packed"
    names = tensors_of(out).keys()
    for number in range(EXPERTS):
        for linear in ("gate_proj", "up_proj", "down_proj"):
            assert f"model.layers.1.feed_forward.experts.{number}.{linear}.{ending}" in names
    before, after = (load_model(find_model(str(place)), CPU).model for place in (base, out))
    assert type(after.model.layers[0].feed_forward.experts).__name__ == "SequentialLlama4TextExperts"
    assert mean_kld(before, after, heldout_ids(base, recipe)) == pytest.approx(
        manifest.quality.mean_kld, rel=0.02, abs=2e-3
    )


def test_they_are_not_pruned_and_a_run_that_quantizes_nothing_is_refused(base: Path, tmp_path: Path) -> None:
    pruned = recipe_with(RULE, passes=[{"prune_experts": {"keep_experts": 2}}, "quantize"])
    with pytest.raises(RecipeError, match="call them with rows that a gate has multiplied"):
        quantize(str(base), pruned, tmp_path / "out", CPU)
    with pytest.raises(RecipeError, match="one in which nothing is quantized would not open"):
        quantize(str(base), recipe_with({"match": "*", "scheme": "none"}), tmp_path / "out", CPU)
    assert not (tmp_path / "out").exists()
