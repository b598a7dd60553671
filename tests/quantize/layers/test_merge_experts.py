"""Merging: who absorbs whom, weights averaged by tokens, neurons aligned, and a checkpoint of a pruned one's form."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.quantize.layers.test_prune_experts import LAYER, assert_reloads_pruned, observed, pruned_only
from tests.quantize.small_runs import CPU, PLAIN_CACHE, pruning, recipe_of, tensors_of
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from lowbit_core.manifest import read_manifest
from lowbit_quantize.passes.merge_experts import absorbers, averaged, matching, merge_experts, reordered
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.statistics.expert_similarity import NEARNESS

NOBODY = torch.zeros(8, dtype=torch.bool)
HIDDEN, MIDDLE = 16, 24


class Gated(nn.Module):
    """An expert: the names that merging knows are those of model/experts/linears.py."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, MIDDLE, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(MIDDLE, HIDDEN, bias=bias)

    def middle(self, inputs: Tensor) -> Tensor:
        return functional.silu(self.gate_proj(inputs)) * self.up_proj(inputs)  # type: ignore[no-any-return]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.down_proj(self.middle(inputs))  # type: ignore[no-any-return]


def expert_of(seed: int, *, bias: bool = False) -> Gated:
    """An expert of random weights."""
    expert, generator = Gated(bias=bias), torch.Generator().manual_seed(seed)
    for parameter in expert.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return expert.requires_grad_(False)


def shuffled(expert: Gated, order: Tensor) -> Gated:
    """The same function with its neurons in another order."""
    other = copy.deepcopy(expert)
    for name, parameter in other.named_parameters():
        parameter.data = reordered(name, parameter.data, order)
    return other


def noisy(expert: Gated, size: float) -> Gated:
    other, generator = copy.deepcopy(expert), torch.Generator().manual_seed(9)
    for parameter in other.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return other


def tokens_of(seed: int, count: int = 64) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


@given(
    seed=st.integers(0, 2**31),
    groups=st.sampled_from([1, 2, 4]),
    per_group=st.integers(1, 4),
    alone=st.lists(st.booleans(), min_size=16, max_size=16),
)
def test_whoever_goes_is_absorbed_once_by_the_nearest_that_stays_in_its_group(
    seed: int, groups: int, per_group: int, alone: list[bool]
) -> None:
    generator, size = torch.Generator().manual_seed(seed), 16 // groups
    nearness = torch.randn(16, 16, generator=generator)
    picked = [torch.randperm(size, generator=generator)[:per_group] + size * g for g in range(groups)]
    kept, stand_alone = torch.cat(picked).sort().values, torch.tensor(alone)
    found = absorbers(nearness, kept, stand_alone, groups)
    for gone in range(16):
        near = [int(k) for k in kept if not alone[k] and int(k) // size == gone // size]
        if gone in kept or alone[gone] or not near:
            assert gone not in found
        else:
            assert found[gone] in near
            assert all(nearness[gone, found[gone]] >= nearness[gone, other] for other in near)


def test_super_experts_are_not_absorbed_and_absorb_nobody() -> None:
    nearness, kept, alone = torch.zeros(8, 8), torch.tensor([0, 1, 2, 3]), NOBODY.clone()
    nearness[:, 0] = 1.0  # all are nearest to expert 0
    alone[[0, 7]] = True
    assert absorbers(nearness, kept, alone, 1).keys() == {4, 5, 6}
    assert 0 not in absorbers(nearness, kept, alone, 1).values()
    assert absorbers(nearness, kept, ~NOBODY, 1) == {}


@pytest.mark.parametrize("similarity", NEARNESS)
def test_nearness_equals_its_formula_and_is_greatest_of_an_expert_to_itself(
    tiny_model: Callable[[str], Path], moe_family: str, similarity: str
) -> None:
    decoder, layer, _, inputs = observed(tiny_model(moe_family))
    block: Any = layer.get_submodule(decoder.architecture.moe_block)
    found = NEARNESS[similarity](block.gate, block.experts, inputs[:40], inputs[:40])
    with torch.no_grad():
        outputs = [expert(inputs[:40]).double() for expert in block.experts]
        logits = inputs[:40].double() @ block.gate.weight.double().T
    for i in range(8):
        for j in range(8):
            near = (
                torch.cosine_similarity(logits[:, i], logits[:, j], dim=0)
                if similarity == "router"
                else -(outputs[i] - outputs[j]).square().sum()
            )
            assert float(found[i, j]) == pytest.approx(float(near), rel=2e-2, abs=1e-3)
    assert torch.equal(found.argmax(1), torch.arange(8))


def test_an_average_is_weighed() -> None:
    group = [expert_of(seed) for seed in range(3)]
    for name, value in averaged(group, [30.0, 10.0, 0.0], None).items():
        first, second = (expert.get_parameter(name) for expert in group[:2])
        torch.testing.assert_close(value, 0.75 * first + 0.25 * second)


@pytest.mark.parametrize("inputs", [None, tokens_of(1)])
@pytest.mark.parametrize("weights", [[5.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
def test_experts_that_no_token_reached_change_nothing(inputs: Tensor | None, weights: list[float]) -> None:
    group = [expert_of(seed) for seed in range(3)]
    for name, value in averaged(group, weights, inputs).items():
        torch.testing.assert_close(value, group[0].get_parameter(name))


def output(group: list[Gated], weights: list[float], aligned_on: Tensor | None, inputs: Tensor) -> Tensor:
    """What the average of a group gives."""
    given: Tensor = functional_call(group[0], averaged(group, weights, aligned_on), (inputs,))
    return given


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bias", [False, True])
def test_alignment_undoes_any_order_of_neurons(seed: int, bias: bool) -> None:
    dominant, x = expert_of(seed, bias=bias), tokens_of(seed)
    order = torch.randperm(MIDDLE, generator=torch.Generator().manual_seed(seed))
    near = noisy(dominant, 0.02)
    other = shuffled(near, order)
    torch.testing.assert_close(other(x), near(x))
    assert torch.equal(order[matching(dominant, other, x)], torch.arange(MIDDLE))
    wanted = output([dominant, near], [2.0, 1.0], None, x)
    torch.testing.assert_close(output([dominant, other], [2.0, 1.0], x, x), wanted)
    assert (output([dominant, other], [2.0, 1.0], None, x) - wanted).norm() > 0.1 * wanted.norm()


def test_only_experts_that_absorb_are_changed_and_nothing_in_place() -> None:
    experts = [expert_of(seed) for seed in range(8)]
    before = copy.deepcopy(experts)
    found = dict(merge_experts(experts, {5: 1, 6: 1, 7: 2}, torch.ones(8), tokens_of(0)))
    assert found.keys() == {1, 2}
    for expert, as_it_was in zip(experts, before, strict=True):
        for name, value in expert.named_parameters():
            assert torch.equal(value, as_it_was.get_parameter(name))


@pytest.mark.parametrize(
    ("family", "consolidate", "similarity"),
    [
        ("mixtral", "average", "output"),
        ("qwen2_moe", "permute", "router"),
        ("deepseek_v2", "permute", "output"),
    ],
)
def test_a_merged_model_has_a_pruned_ones_form_and_router_and_reloads_as_it_was_measured(
    tiny_model: Callable[[str], Path], family: str, consolidate: str, similarity: str, tmp_path: Path
) -> None:
    base, out = tiny_model(family), tmp_path / "out"
    recipe = pruned_only(prune_ratio=0.5, consolidate=consolidate, similarity=similarity)
    manifest = quantize(str(base), recipe, out, CPU)
    assert_reloads_pruned(base, out, recipe, manifest)
    assert manifest == read_manifest(out)
    dropped = quantize(str(base), pruned_only(prune_ratio=0.5), tmp_path / "dropped", CPU).experts
    experts = manifest.experts
    assert experts is not None
    assert dropped is not None
    assert (experts.consolidate, experts.similarity) == (consolidate, similarity)
    assert (dropped.consolidate, dropped.similarity, dropped.absorbed_by_layer) == (None, None, {})
    for layer, kept in experts.kept_by_layer.items():
        absorbed_by = experts.absorbed_by_layer[layer]
        assert sorted([*kept, *absorbed_by]) == list(range(8))
        assert set(absorbed_by.values()) <= set(kept)
        if family == "deepseek_v2":
            assert all(gone // 2 == by // 2 for gone, by in absorbed_by.items())
    merged_files, dropped_files = tensors_of(out), tensors_of(tmp_path / "dropped")
    assert {n: (t.shape, t.dtype) for n, t in merged_files.items()} == {
        n: (t.shape, t.dtype) for n, t in dropped_files.items()
    }
    assert (out / "config.json").read_text() == (tmp_path / "dropped" / "config.json").read_text()
    first = min(experts.kept_by_layer)
    assert experts.kept_by_layer[first] == dropped.kept_by_layer[first]
    differ = {
        name for name, tensor in merged_files.items()
        if f"layers.{first}." in name and not torch.equal(tensor, dropped_files[name])
    }  # fmt: skip
    assert differ
    assert all(".experts." in name for name in differ)


def test_a_merged_and_quantized_model_reloads_as_it_was_measured(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = recipe_of("awq-g64", pruning(keep_experts=4, consolidate="permute"), PLAIN_CACHE)
    manifest = quantize(str(tiny_model("qwen3_moe")), recipe, tmp_path / "out", CPU)
    assert_reloads_pruned(tiny_model("qwen3_moe"), tmp_path / "out", recipe, manifest)


def test_routers_are_distilled_after_merging_as_after_dropping(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    passes = [{"prune_experts": {"keep_experts": 4, "consolidate": "permute"}}, "distill_router"]
    recipe = recipe_of("awq-g64", "modules=[]", PLAIN_CACHE, f"passes={json.dumps(passes)}")
    manifest = quantize(str(tiny_model("qwen3_moe")), recipe, tmp_path / "out", CPU)
    assert manifest.trial is not None
    assert manifest.quality.mean_kld == min(manifest.trial.kld_with, manifest.trial.kld_without)
    assert manifest.experts is not None
    assert {len(absorbed) for absorbed in manifest.experts.absorbed_by_layer.values()} == {4}
    assert LAYER in manifest.experts.absorbed_by_layer


def test_where_nobody_goes_nothing_is_merged(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = pruned_only(prune_ratio=0, consolidate="average")
    manifest = quantize(str(tiny_model("qwen3_moe")), recipe, tmp_path / "out", CPU)
    assert manifest.experts is not None
    assert set(map(len, manifest.experts.absorbed_by_layer.values())) == {0}
    assert manifest.quality.mean_kld == pytest.approx(0, abs=1e-9)
