"""Experts: scored by the papers' formulas, cut out of router and block together, and plain transformers agrees."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.quantize.test_pipeline import CPU, recipe_of, reloaded_kld
from tests.quantize.test_stream import decoder_of, token_ids
from tests.tiny_models import write_tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowbit_core.errors import NumericsError
from lowbit_quantize.architectures import ARCHITECTURES
from lowbit_quantize.expert_pruning import (
    CRITERIA,
    ExpertStatistics,
    choose,
    prune_layer,
    pruned_router,
    routing_of,
    score,
)
from lowbit_quantize.export import CheckpointWriter
from lowbit_quantize.observe import Sample
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.router_distillation import distill_router
from lowbit_quantize.stream import Decoder

MOE_FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "deepseek_v2")
LAYER = 2  # routed in every tiny model
EVERY = (*CRITERIA, "random")


@pytest.fixture(params=MOE_FAMILIES)
def moe_family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def observed(directory: Path) -> tuple[Decoder, nn.Module, ExpertStatistics, Tensor]:
    """A decoder, its routed layer, what routing showed, and the block's inputs."""
    decoder = decoder_of(directory)
    hidden = decoder.embed(token_ids())
    layer = decoder.load_layer(LAYER)
    seen, inputs = ExpertStatistics(8), Sample(10_000)
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
    seen = ExpertStatistics(8)
    assert torch.equal(score(seen, "random", 1, 2), score(seen, "random", 1, 2))
    assert not torch.equal(score(seen, "random", 1, 2), score(seen, "random", 2, 2))
    assert not torch.equal(score(seen, "random", 1, 2), score(seen, "random", 1, 3))


def test_each_routing_group_keeps_as_many() -> None:
    scores = torch.tensor([9.0, 8, 7, 6, 1, 2, 3, 4])
    nobody = torch.zeros(8, dtype=torch.bool)
    assert choose(scores, nobody, 4, 1).tolist() == [0, 1, 2, 3]
    assert choose(scores, nobody, 4, 2).tolist() == [0, 1, 6, 7]
    assert choose(scores, nobody, 4, 4).tolist() == [0, 2, 5, 7]


@pytest.mark.parametrize("criterion", EVERY)
def test_a_super_expert_stays_under_every_criterion(criterion: str) -> None:
    seen = ExpertStatistics(8)
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
        self.register_buffer("e_score_correction_bias", torch.randn(8))


def test_router_rows_biases_and_buffers_shrink_together() -> None:
    router, kept = BiasedRouter(), torch.tensor([1, 4, 6])
    pruned: Any = pruned_router(router, kept)
    for name in ("weight", "bias", "e_score_correction_bias"):
        assert torch.equal(getattr(pruned, name), getattr(router, name)[kept])
    assert torch.equal(pruned.scale, router.scale)
    assert (pruned.num_experts, router.num_experts, len(router.weight)) == (3, 8, 8)
    assert "e_score_correction_bias" in dict(pruned.named_buffers())


@pytest.mark.parametrize("method", ["none", "awq"])
def test_a_pruned_model_reloads_as_it_was_measured(
    tiny_model: Callable[[str], Path], moe_family: str, method: str, tmp_path: Path
) -> None:
    base, out = tiny_model(moe_family), tmp_path / "out"
    recipe = recipe_of("awq-g64", f"weights.method={method}", "experts.prune=0.5", "kv_cache.dtype=none")
    manifest = quantize(str(base), recipe, out, CPU)
    assert reloaded_kld(base, out, recipe) == pytest.approx(manifest.quality.mean_kld, abs=1e-3)
    assert manifest.experts is not None
    assert (manifest.experts.experts, manifest.experts.kept, manifest.experts.criterion) == (8, 4, "reap")
    assert AutoConfig.from_pretrained(out).num_experts == 4
    if method == "none":
        model, pruned = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in (base, out)
        )
        for layer, kept in manifest.experts.kept_by_layer.items():
            blocks = [each.model.layers[layer].mlp for each in (model, pruned)]
            assert torch.equal(blocks[0].gate.weight[kept], blocks[1].gate.weight)
            assert torch.equal(blocks[0].experts.down_proj[kept], blocks[1].experts.down_proj)
            if moe_family == "deepseek_v2":
                assert [expert // 2 for expert in kept] == [0, 1, 2, 3]


def test_pruning_less_hurts_less(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    plain = ("weights.method=none", "kv_cache.dtype=none")
    few, many = (
        quantize(
            str(tiny_model("olmoe")), recipe_of("awq-g64", *plain, f"experts.prune={n}"), tmp_path / n, CPU
        )
        for n in ("7", "2")
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
    recipe = recipe_of("awq-g64", f"weights.method={method}", "kv_cache.dtype=none")
    manifest = quantize(str(base), recipe, tmp_path / "out", CPU)
    assert manifest.experts is not None
    unseen = [(expert.layer, expert.expert) for expert in manifest.experts.starved if expert.tokens == 0]
    assert (1, 0) in unseen
    assert (2, 0) in unseen
    written = {k: v for path in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(path).items()}
    assert all(torch.isfinite(tensor).all() for tensor in written.values() if tensor.is_floating_point())
    assert "model.layers.1.mlp.experts.0.down_proj.weight_packed" in written
    assert "model.layers.1.mlp.experts.0.down_proj" in {module.name for module in manifest.modules}


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="the tensor bad is not finite"):
        CheckpointWriter(tmp_path, 1).write_shard({"good": torch.ones(2), "bad": torch.tensor([torch.nan])})
    assert not list(tmp_path.iterdir())


def test_a_distilled_router_lowers_the_error_of_its_block(
    tiny_model: Callable[[str], Path], moe_family: str
) -> None:
    decoder, layer, _, inputs = observed(tiny_model(moe_family))
    block: Any = layer.get_submodule(decoder.architecture.moe_block)
    inputs = inputs[:500]

    def routed() -> Tensor:
        with torch.inference_mode():
            _, gates, chosen = block.gate(inputs)
            return block.experts(inputs, chosen, gates).clone()  # type: ignore[no-any-return]

    target = routed()
    prune_layer(layer, decoder.architecture, torch.tensor([0, 2, 4, 6]))
    before, weight = (routed() - target).float().square().sum(), block.gate.weight
    kept = distill_router(layer, decoder.architecture, inputs, target)
    after = (routed() - target).float().square().sum()
    assert block.gate.weight.dtype == weight.dtype
    assert after < before if kept else torch.equal(block.gate.weight, weight)


def test_distilled_routers_stay_only_where_they_lower_held_out_kl(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = recipe_of("awq-g64", "weights.method=none", "kv_cache.dtype=none", "experts.prune=0.5")
    plain = quantize(str(tiny_model("qwen3_moe")), recipe, tmp_path / "plain", CPU)
    distilling = recipe.model_copy(
        update={"experts": recipe.experts.model_copy(update={"router_distillation": True})}
    )
    manifest = quantize(str(tiny_model("qwen3_moe")), distilling, tmp_path / "out", CPU)
    assert manifest.experts is not None
    record = manifest.experts.router_distillation
    assert record is not None
    assert record.kld_without == plain.quality.mean_kld
    assert record.kept == (record.kld_with < record.kld_without)
    assert manifest.quality.mean_kld == min(record.kld_with, record.kld_without)
    measured = reloaded_kld(tiny_model("qwen3_moe"), tmp_path / "out", recipe)
    assert measured == pytest.approx(manifest.quality.mean_kld, abs=1e-3)


def test_the_table_knows_every_family_with_experts() -> None:
    assert {name for name, entry in ARCHITECTURES.items() if entry.moe_block} == set(MOE_FAMILIES)


def test_the_configuration_counts_what_stays(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = recipe_of("awq-g64", "weights.method=none", "kv_cache.dtype=none", "experts.prune=6")
    quantize(str(tiny_model("mixtral")), recipe, tmp_path / "out", CPU)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {config.get(name, 6) for name in ("num_experts", "num_local_experts", "n_routed_experts")} == {6}
