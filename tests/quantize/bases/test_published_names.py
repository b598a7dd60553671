"""Names, stacks and types of any family are transformers': what is read is what it loads, what is written it saves."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantize.tiny_families import FAMILIES, config_of, saved_family, tiny_family
from torch import Tensor, nn

from lowbit_quantize.model.decoder import Decoder
from lowbit_quantize.model.discovery.found import find_architecture
from lowbit_quantize.model.experts.linears import ExpertList, is_stack, unstack_experts
from lowbit_quantize.model.files.base_weights import BaseWeights, wanted_of
from lowbit_quantize.model.files.kept_types import KeptTypes
from lowbit_quantize.model.files.published_names import PublishedNames
from lowbit_quantize.model.hooks import attention_observed_by
from lowbit_quantize.model.skeleton import build_skeleton, model_class
from lowbit_quantize.model.weights import WeightFiles

Saved = Callable[[str], Path]
HALF = torch.bfloat16


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """`saved(family)` is the directory of a tiny model in float32."""

    def save(family: str) -> Path:
        saved_family(directory := tmp_path_factory.mktemp(family), family)
        return directory

    return cache(save)


def skeleton_of(family: str) -> nn.Module:
    return build_skeleton(config_of(family))


def weights_of(family: str, directory: Path) -> BaseWeights:
    wanted = wanted_of(skeleton_of(family), FAMILIES[family].architecture(family))
    return BaseWeights(WeightFiles(directory), wanted, None)


def loaded(family: str, directory: Path, dtype: torch.dtype = HALF) -> Any:
    found = model_class(config_of(family))
    attention = "sdpa" if found._supports_sdpa else "eager"
    return found.from_pretrained(directory, dtype=dtype, attn_implementation=attention).eval()


def read_all(weights: BaseWeights, kept: KeptTypes, dtype: torch.dtype = HALF) -> dict[str, Tensor]:
    inner = sorted(name for name in weights.wanted.names.inner if name in weights)
    return {name: weights.read(name).to(kept.dtype(name, dtype)) for name in inner}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_what_transformers_loads_in_its_type(saved: Saved, family: str) -> None:
    weights = weights_of(family, saved(family))
    names, state = weights.wanted.names, loaded(family, saved(family)).state_dict()
    found = read_all(weights, KeptTypes(skeleton_of(family), names))
    absent = names.inner - found.keys()
    assert absent == ({weights.wanted.tied[0]} if weights.wanted.tied else set())
    for name, tensor in found.items():
        part = names.slices.get(name)
        meant = part.of(state[part.stack][part.entry]) if part else state[name]
        assert weights.shape(name) == tuple(meant.shape), name
        assert tensor.dtype == meant.dtype, name
        assert torch.equal(tensor, meant), name


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_what_transformers_saves(saved: Saved, family: str) -> None:
    weights, files = weights_of(family, saved(family)), WeightFiles(saved(family))
    names = weights.wanted.names
    written = names.publish({name: weights.read(name) for name in names.inner if name in weights})
    assert written.keys() == set(files)
    assert all(torch.equal(tensor, files.read(name)) for name, tensor in written.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_walk_does_not_read_of_a_family_are_its_towers(saved: Saved, family: str) -> None:
    rest = [name for name, _ in weights_of(family, saved(family)).unclaimed()]
    assert bool(rest) == FAMILIES[family].wrapper
    assert all("visual." in name or "vision_tower." in name or "projector." in name for name in rest)


def test_a_tensor_keeps_the_type_that_its_class_asks_for_in_each_type_that_is_computed_in() -> None:
    for family, name, kept in (
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias", {torch.float16, HALF}),
        ("gpt_oss", "model.layers.1.input_layernorm.weight", {torch.float16}),
        ("gpt_oss", "model.layers.1.mlp.experts.1.up_proj.weight", set()),
    ):
        skeleton = skeleton_of(family)
        types = KeptTypes(skeleton, PublishedNames(skeleton))
        for dtype in (torch.float16, HALF):
            assert types.dtype(name, dtype) == (torch.float32 if dtype in kept else dtype), (name, dtype)


def test_a_layer_is_loaded_with_its_correction_in_float32(saved: Saved) -> None:
    layer = decoder_of("deepseek_v3", saved("deepseek_v3")).load_layer(1)
    types = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
    assert types.pop("mlp.gate.e_score_correction_bias") == torch.float32
    assert set(types.values()) == {HALF}


@pytest.mark.parametrize(
    ("family", "published"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.{w1,w3,w2}"),
        ("minimax_m2", "model.layers.1.block_sparse_moe.experts.3.{w1,w3,w2}"),
        ("qwen3_moe", "model.layers.1.mlp.experts.3.{gate_proj,up_proj,down_proj}"),
        ("qwen3_5_moe", "model.language_model.layers.1.mlp.experts.3.{gate_proj,up_proj,down_proj}"),
        ("gpt_oss", "model.layers.1.mlp.experts.3.{gate_proj,up_proj,down_proj}"),
        ("granitemoehybrid", "model.layers.1.block_sparse_moe.experts.3.{gate_proj,up_proj,down_proj}"),
        ("nemotron_h", "backbone.layers.3.mixer.experts.3.{,up_proj,down_proj}"),
    ],
)
def test_a_quantized_expert_is_single_and_has_the_name_of_its_family(family: str, published: str) -> None:
    names = PublishedNames(skeleton_of(family))
    stem, _, leaves = published.rstrip("}").partition("{")
    for ours, theirs in zip(("gate_proj", "up_proj", "down_proj"), leaves.split(","), strict=True):
        name = next((n for n in names.slices if n.endswith(f".3.{ours}.weight")), None)
        assert (name is None) == (theirs == "")
        if name is not None:
            module = name.replace(".layers.0.", ".layers.1.").removesuffix(".weight")
            assert names.published(module) == f"{stem}{theirs}"
            tensors = {f"{module}.weight_packed": torch.zeros(2), f"{module}.weight_scale": torch.zeros(2)}
            kinds = ("weight_packed", "weight_scale")
            assert names.publish(tensors).keys() == {f"{stem}{theirs}.{kind}" for kind in kinds}


def test_experts_that_transformers_opens_in_stacks_only_are_known() -> None:
    """A checkpoint of single ones could not be opened; those of the other families are."""
    closed = {family for family in STACKED if PublishedNames(skeleton_of(family)).closed}
    assert closed == {"gpt_oss", "granitemoehybrid", "qwen3_vl_moe"}
    names = PublishedNames(skeleton_of("gpt_oss"))
    assert len(names.closed) == 3 * 4 * 3
    assert "model.layers.2.mlp.experts.3.up_proj" in names.closed


def test_scales_of_a_cache_lie_beside_the_published_linears() -> None:
    for family, prefix in (
        ("mistral3", "language_model.model"),
        ("gemma3", "language_model.model"),
        ("llama", "model"),
    ):
        names, layers = PublishedNames(skeleton_of(family)), FAMILIES[family].architecture(family).layers
        assert names.published(f"{layers}.2.self_attn.k_scale") == f"{prefix}.layers.2.self_attn.k_scale"
        assert names.published(f"{layers}.2.self_attn.k_proj") == f"{prefix}.layers.2.self_attn.k_proj"


STACKED = (
    "qwen3_moe",
    "gpt_oss",
    "granitemoehybrid",
    "nemotron_h",
    "deepseek_v4",
    "qwen3_vl_moe",
    "minimax_m2",
)


@pytest.mark.parametrize("family", STACKED)
def test_experts_of_plain_linears_compute_what_stacked_ones_do(family: str) -> None:
    model = tiny_family(family)
    name, stacked = next((name, module) for name, module in model.named_modules() if is_stack(module))
    stacked.config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(1)
    hidden = 8 * torch.randn(24, 64, generator=generator)  # far enough for clamps
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(24)])
    gates = torch.rand(24, 2, generator=generator)
    with torch.no_grad():
        expected = stacked(hidden, chosen, gates)
        assert name in unstack_experts(model)
        experts = model.get_submodule(name)
        assert isinstance(experts, ExpertList)
        # Sums of 64 float32 products in other orders: an AMD processor's differ by 6e-5 in outputs of about 4.
        torch.testing.assert_close(experts(hidden, chosen, gates), expected, rtol=1e-4, atol=1e-4)


def decoder_of(family: str, directory: Path, dtype: torch.dtype = HALF) -> Decoder:
    skeleton = skeleton_of(family)
    architecture = find_architecture(config_of(family), skeleton)
    weights = BaseWeights(WeightFiles(directory), wanted_of(skeleton, architecture), None)
    return Decoder(config_of(family), architecture, weights, torch.device("cpu"), skeleton, dtype)


WALKED = (
    "deepseek_v3", "glm4_moe", "minimax_m2", "gpt_oss", "qwen3_next", "lfm2", "nemotron_h",
    "mistral3", "gemma3", "qwen3_5_moe", "qwen3_vl_moe",
)  # fmt: skip


@pytest.mark.parametrize("family", WALKED)
def test_a_walk_on_text_is_the_whole_model(saved: Saved, family: str) -> None:
    """Of wrappers too; in float32, where no router sees a near tie."""
    decoder = decoder_of(family, saved(family), torch.float32)
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(5))
    hidden = decoder.embed(ids)
    for index in range(decoder.depth):
        decoder.advance(decoder.load_layer(index), index, hidden)
    norm, head = decoder.head()
    with torch.no_grad():
        expected = loaded(family, saved(family), torch.float32)(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(norm(hidden) @ head.T, expected, atol=1e-4, rtol=1e-3)


def test_attention_with_sinks_is_seen_and_is_the_familys_own(saved: Saved) -> None:
    decoder = decoder_of("gpt_oss", saved("gpt_oss"))
    layer, hidden = decoder.load_layer(1), decoder.embed(torch.arange(3, 43).view(1, 40))
    seen: list[tuple[torch.Size, torch.Size, float]] = []
    plain = next(decoder.run_layer(layer, 1, hidden))
    with attention_observed_by(lambda q, k, mask, scale: seen.append((q.shape, k.shape, scale))):
        assert torch.equal(next(decoder.run_layer(layer, 1, hidden)), plain)
    assert seen == [(torch.Size([1, 4, 40, 16]), torch.Size([1, 2, 40, 16]), 0.25)]
    layer.get_parameter("self_attn.sinks").fill_(9.0)
    assert not torch.allclose(next(decoder.run_layer(layer, 1, hidden)), plain)
