"""Experts: scored by the papers' formulas, cut out of router and block together, and plain transformers agrees."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.quantize.conftest import ROUTED
from tests.quantize.layers.test_decoder import decoder_of, token_ids
from tests.quantize.small_runs import (
    CPU,
    PLAIN_CACHE,
    pruning,
    recipe_of,
    reloaded_kld,
    tensors_of,
)
from tests.tiny_models import write_tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowbit_core.errors import NumericsError, RecipeError
from lowbit_core.manifest import Manifest
from lowbit_quantize.model.decoder import Decoder
from lowbit_quantize.model.experts.routing import RoutingGroups, leave_of, routing_groups
from lowbit_quantize.passes.prune_experts import (
    PruneExperts,
    PruneExpertsKind,
    PruneExpertsOptions,
    choose,
)
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.recipe import Recipe
from lowbit_quantize.run.writer import CheckpointWriter
from lowbit_quantize.statistics.expert_saliency import CRITERIA, ExpertSaliency, routing_of, score
from lowbit_quantize.statistics.sample import Sample

LAYER = 2  # routed in every tiny model
EVERY = (*CRITERIA, "random")


def pruned_only(**options: Any) -> Recipe:
    """A recipe that prunes experts and quantizes nothing."""
    passes = [{"prune_experts": options}]
    return recipe_of("awq-g64", "modules=[]", PLAIN_CACHE, f"passes={json.dumps(passes)}")


def observed(directory: Path) -> tuple[Decoder, nn.Module, ExpertSaliency, Tensor]:
    """A decoder, its routed layer, what routing showed, and the block's inputs."""
    decoder = decoder_of(directory)
    hidden = decoder.embed(token_ids())
    layer = decoder.load_layer(LAYER)
    seen, inputs = ExpertSaliency(8), Sample(10_000)
    with routing_of(layer, decoder.architecture, seen, inputs):
        list(decoder.run_layer(layer, LAYER, hidden))
    return decoder, layer, seen, inputs.rows().clone()


def naive_scores(directory: Path, inputs: Tensor) -> dict[str, Tensor]:
    """Every criterion from transformers' own block with stacked experts, one token at a time."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    block: Any = model.model.layers[LAYER].mlp
    experts = block.experts
    found: list[list[tuple[float, float]]] = [[] for _ in range(8)]  # (gate, norm) of each routed token
    with torch.inference_mode():
        _, gates, chosen = block.gate(inputs)
        for token, (weights, numbers) in enumerate(zip(gates, chosen, strict=True)):
            for gate, number in zip(weights.tolist(), numbers.tolist(), strict=True):
                first, second = (experts.gate_up_proj[number] @ inputs[token]).chunk(2)
                output = experts.down_proj[number] @ (experts.act_fn(first) * second)
                found[number].append((gate, float(output.float().norm())))
    counts = torch.tensor([len(tokens) for tokens in found]).double()
    norms = torch.tensor([sum(norm for _, norm in tokens) for tokens in found]).double()
    gated = torch.tensor([sum(gate * norm for gate, norm in tokens) for tokens in found]).double()
    divisor = counts.clamp(min=1)
    return {
        "reap": gated / divisor, "gated-norm": gated, "man": norms / divisor, "ean": norms, "frequency": counts,
    }  # fmt: skip


def test_every_criterion_equals_its_formula(tiny_model: Callable[[str], Path], moe_family: str) -> None:
    _, _, seen, inputs = observed(tiny_model(moe_family))
    expected = naive_scores(tiny_model(moe_family), inputs)
    assert expected.keys() == CRITERIA.keys()
    for name, values in expected.items():
        torch.testing.assert_close(score(seen, name, 0, LAYER), values, rtol=2e-2, atol=1e-6)
    assert torch.equal(seen.tokens, expected["frequency"])


def test_random_depends_on_seed_and_layer_only() -> None:
    seen = ExpertSaliency(8)
    assert torch.equal(score(seen, "random", 1, 2), score(seen, "random", 1, 2))
    assert not torch.equal(score(seen, "random", 1, 2), score(seen, "random", 2, 2))
    assert not torch.equal(score(seen, "random", 1, 2), score(seen, "random", 1, 3))


def test_each_routing_group_keeps_as_many() -> None:
    scores = torch.tensor([9.0, 8, 7, 6, 1, 2, 3, 4])
    nobody = torch.zeros(8, dtype=torch.bool)
    assert choose(scores, nobody, 4, 1).tolist() == [0, 1, 2, 3]
    assert choose(scores, nobody, 4, 2).tolist() == [0, 1, 6, 7]
    assert choose(scores, nobody, 4, 4).tolist() == [0, 2, 5, 7]


@pytest.mark.parametrize(
    ("method", "found"),
    [
        ("greedy", RoutingGroups(1, 1, 1)),
        ("group_limited_greedy", RoutingGroups(4, 2, 1)),
        ("noaux_tc", RoutingGroups(4, 2, 2)),
        (None, RoutingGroups(4, 2, 2)),
    ],
)
def test_routing_groups_are_those_that_the_router_uses(method: str | None, found: RoutingGroups) -> None:
    named = {} if method is None else {"topk_method": method}
    assert routing_groups(SimpleNamespace(n_group=4, topk_group=2, **named)) == found
    assert routing_groups(SimpleNamespace(n_group=1, topk_group=1, **named)) == RoutingGroups()
    assert routing_groups(SimpleNamespace()) == RoutingGroups()


def test_a_router_that_chooses_groups_by_two_experts_keeps_two_in_each(
    tiny_model: Callable[[str], Path],
) -> None:
    architecture = decoder_of(tiny_model("deepseek_v2")).architecture
    config = SimpleNamespace(num_local_experts=16, num_experts_per_tok=2, n_group=4, topk_group=2)

    def made(kept: int) -> PruneExperts:
        options = PruneExpertsOptions(keep_experts=kept)
        return PruneExpertsKind().make(options, config, architecture, "a model")

    assert (made(8).groups, made(8).kept) == (4, 8)
    with pytest.raises(RecipeError, match="chooses each of 4 groups by 2 experts; allowed counts: 8, 12, 16"):
        made(4)
    with pytest.raises(RecipeError, match="4 routing groups do not divide; allowed counts: 8, 12, 16"):
        made(10)


@pytest.mark.parametrize("criterion", EVERY)
def test_a_super_expert_stays_under_every_criterion(criterion: str) -> None:
    seen = ExpertSaliency(8)
    for expert in range(8):
        rare = expert == 5
        for _ in range(1 if rare else 20):  # seen once, with a small gate, and one huge channel
            outputs = torch.full((4, 16), 0.0 if rare else 1.0)
            outputs[0, 0] = 50.0 if rare else 1.0
            seen.observe(expert, outputs, torch.full((4,), 1e-6 if rare else 0.5))
    assert seen.super_experts.nonzero().flatten().tolist() == [5]
    for seed in range(5):
        assert 5 in choose(score(seen, criterion, seed, 0), seen.super_experts, 2, 1)


def test_ordinary_experts_are_not_taken_for_super_experts(
    tiny_model: Callable[[str], Path], moe_family: str
) -> None:
    assert not observed(tiny_model(moe_family))[2].super_experts.any()


class BiasedRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.top_k = 8, 2
        self.weight = nn.Parameter(torch.randn(8, 16))
        self.bias = nn.Parameter(torch.randn(8))
        self.scale = nn.Parameter(torch.randn(1))
        self.register_buffer("e_score_correction_bias", torch.randn(1, 8))


class BiasedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 8
        self.router, self.shared = BiasedRouter(), nn.Linear(16, 8)
        self.expert_bias = nn.Parameter(torch.randn(8))


def test_what_has_an_entry_for_each_expert_shrinks_and_nothing_else() -> None:
    block, kept = BiasedBlock(), torch.tensor([1, 4, 6])
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    leave_of(block, block.router, 8, kept)
    after = block.state_dict()
    for name in ("router.weight", "router.bias", "expert_bias"):
        assert torch.equal(after.pop(name), before.pop(name)[kept])
    name = "router.e_score_correction_bias"
    assert torch.equal(after.pop(name), before.pop(name)[:, kept])
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert (block.num_experts, block.router.num_experts, block.shared.out_features) == (3, 3, 8)
    assert "e_score_correction_bias" in dict(block.router.named_buffers())


def assert_reloads_pruned(base: Path, out: Path, recipe: Recipe, manifest: Manifest) -> None:
    assert reloaded_kld(base, out, recipe) == pytest.approx(manifest.quality.mean_kld, abs=1e-3)
    assert manifest.experts is not None
    assert (manifest.experts.experts, manifest.experts.kept, manifest.experts.criterion) == (8, 4, "reap")
    assert AutoConfig.from_pretrained(out).num_experts == 4


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2_moe", "deepseek_v2"]
)  # renamed, shared, and grouped experts
def test_a_pruned_model_reloads_as_it_was_measured_and_its_experts_are_the_bases(
    tiny_model: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    base, out, recipe = tiny_model(family), tmp_path / "out", pruned_only(prune_ratio=0.5)
    manifest = quantize(str(base), recipe, out, CPU)
    assert_reloads_pruned(base, out, recipe, manifest)
    model, pruned = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in (base, out))
    assert manifest.experts is not None
    for layer, kept in manifest.experts.kept_by_layer.items():
        blocks = [each.model.layers[layer].mlp for each in (model, pruned)]
        assert torch.equal(blocks[0].gate.weight[kept], blocks[1].gate.weight)
        assert torch.equal(blocks[0].experts.down_proj[kept], blocks[1].experts.down_proj)
        if family == "deepseek_v2":
            assert [expert // 2 for expert in kept] == [0, 1, 2, 3]


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
def test_a_pruned_and_quantized_model_reloads_as_it_was_measured(
    tiny_model: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    recipe = recipe_of("awq-g64", pruning(keep_experts=4), PLAIN_CACHE)
    manifest = quantize(str(tiny_model(family)), recipe, tmp_path / "out", CPU)
    assert_reloads_pruned(tiny_model(family), tmp_path / "out", recipe, manifest)


def test_pruning_less_hurts_less(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    few, many = (
        quantize(str(tiny_model("olmoe")), pruned_only(keep_experts=n), tmp_path / str(n), CPU)
        for n in (7, 2)
    )
    assert 0 < few.quality.mean_kld < many.quality.mean_kld
    assert few.size.bytes > many.size.bytes


def never_route_to_the_first(directory: Path) -> Path:
    """Of two opposite rows one is positive; with two such pairs, a row of zeros is never among the best two."""
    tensors = load_file(directory / "model.safetensors")
    for name, gate in tensors.items():
        if name.endswith("mlp.gate.weight"):
            gate[0] = 0
            gate[2], gate[4] = -gate[1], -gate[3]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_an_expert_that_no_token_reached_is_quantized_finite_and_listed(method: str, tmp_path: Path) -> None:
    base = never_route_to_the_first(write_tiny_model(tmp_path / "base", "qwen3_moe"))
    recipe = recipe_of("awq-g64", f"modules.0.methods=[{method}]", PLAIN_CACHE)
    manifest = quantize(str(base), recipe, tmp_path / "out", CPU)
    assert manifest.experts is not None
    unseen = [(one.layer, one.expert) for one in manifest.experts.under_calibrated if one.tokens == 0]
    assert (1, 0) in unseen
    assert (2, 0) in unseen
    written = tensors_of(tmp_path / "out")
    assert all(torch.isfinite(tensor).all() for tensor in written.values() if tensor.is_floating_point())
    assert "model.layers.1.mlp.experts.0.down_proj.weight_packed" in written
    assert "model.layers.1.mlp.experts.0.down_proj" in {module.name for module in manifest.modules}


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="the tensor bad is not finite"):
        CheckpointWriter(tmp_path, 1).write_shard({"good": torch.ones(2), "bad": torch.tensor([torch.nan])})
    assert not list(tmp_path.iterdir())


def test_the_table_knows_every_family_with_experts() -> None:
    assert set(ROUTED) == {"qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "deepseek_v2"}


def test_the_configuration_counts_what_stays(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    quantize(str(tiny_model("mixtral")), pruned_only(keep_experts=6), tmp_path / "out", CPU)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {config.get(name, 6) for name in ("num_experts", "num_local_experts", "n_routed_experts")} == {6}


def test_a_ratio_of_nothing_keeps_every_expert(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    manifest = quantize(str(tiny_model("qwen3_moe")), pruned_only(prune_ratio=0), tmp_path / "out", CPU)
    assert manifest.experts is not None
    assert manifest.experts.kept == 8
    assert manifest.quality.mean_kld == pytest.approx(0, abs=1e-9)
