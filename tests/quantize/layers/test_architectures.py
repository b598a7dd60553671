"""What is found of whole families: groups, folds and roles, and what is around their layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import LATE_SHARED, TOLD
from transformers import AutoConfig

from lowbit_core.errors import ModelError, RecipeError
from lowbit_quantize.model.architecture import Architecture, LayerKind
from lowbit_quantize.model.discovery.found import find_architecture, open_model
from lowbit_quantize.model.discovery.twin import make_twin
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.model.skeleton import build_skeleton
from lowbit_quantize.model.streams.form import StreamForm
from lowbit_quantize.passes.prune_experts import PruneExpertsKind, PruneExpertsOptions

QKV = "self_attn.q_proj self_attn.k_proj self_attn.v_proj <- input_layernorm"
O_PROJ = "self_attn.o_proj <- self_attn.v_proj"
GATE_UP = "mlp.gate_proj mlp.up_proj <- post_attention_layernorm"
DOWN = "mlp.down_proj <- mlp.up_proj"
EXPERTS = [
    "mlp.experts.*.gate_proj mlp.experts.*.up_proj <- post_attention_layernorm",
    "mlp.experts.*.down_proj <- mlp.experts.*.up_proj",
]
SHARED = "mlp.shared_expert.gate_proj mlp.shared_expert.up_proj <- post_attention_layernorm"
LATENT = [
    "self_attn.q_a_proj self_attn.kv_a_proj_with_mqa <- input_layernorm",
    "self_attn.q_b_proj <- self_attn.q_a_layernorm",
    "self_attn.kv_b_proj <- self_attn.kv_a_layernorm",
    "self_attn.o_proj <- self_attn.kv_b_proj",
]
LLAMA = {QKV, O_PROJ, GATE_UP, DOWN}
EXPECTED = {  # of the last layer
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "phi3": {
        "self_attn.qkv_proj <- input_layernorm",
        "self_attn.o_proj <- self_attn.qkv_proj",
        "mlp.gate_up_proj <- post_attention_layernorm",
        "mlp.down_proj <- mlp.gate_up_proj",
    },
    "gemma3_text": {QKV, O_PROJ, "mlp.gate_proj mlp.up_proj <- pre_feedforward_layernorm", DOWN},
    "olmo2": {
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj <-",
        O_PROJ,
        "mlp.gate_proj mlp.up_proj <-",
        DOWN,
    },
    "olmoe": {QKV, O_PROJ, *EXPERTS},
    "mixtral": {QKV, O_PROJ, *EXPERTS},
    "qwen3_moe": {QKV, O_PROJ, *EXPERTS},
    "qwen2_moe": {
        QKV, O_PROJ, *EXPERTS, SHARED, "mlp.shared_expert.down_proj <- mlp.shared_expert.up_proj"
    },
    "deepseek_v2": {
        *LATENT, *EXPERTS, SHARED.replace("shared_expert", "shared_experts"),
        "mlp.shared_experts.down_proj <- mlp.shared_experts.up_proj",
    },
}  # fmt: skip


def groups(kind: LayerKind) -> set[str]:
    return {
        f"{' '.join(group.linears)} <- {group.fold.producer if group.fold else ''}".strip()
        for group in kind.groups
    }


def found(model_type: str, **sizes: Any) -> Architecture:
    config = AutoConfig.for_model(model_type, **sizes)
    return find_architecture(config, build_skeleton(config))


def test_every_family_of_our_tests_is_found_as_it_is(
    tiny_model: Callable[[str], Path], any_family: str
) -> None:
    architecture, _ = open_model(find_model(str(tiny_model(any_family))))
    kind = architecture.kinds[-1]
    assert groups(kind) == EXPECTED[any_family]
    assert architecture.tested
    assert (kind.attention, kind.attention_end) == ("self_attn", "self_attn.o_proj")
    assert kind.dropped == ()
    attended = {name for group in kind.groups if group.attended for name in group.linears}
    latent = {"self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj"}
    fused = {"self_attn.qkv_proj"} if any_family == "phi3" else set(QKV.split()[:3])
    assert attended == (latent if any_family == "deepseek_v2" else fused)
    residual = {group.residual for group in kind.groups} - {""}
    after = "" if any_family in ("gemma3_text", "olmo2") else "input_layernorm"
    assert residual - {"post_attention_layernorm"} == ({after} - {""})


def test_routers_and_gates_read_with_the_experts_and_stay_as_they_are(
    tiny_model: Callable[[str], Path],
) -> None:
    kind = open_model(find_model(str(tiny_model("qwen2_moe"))))[0].kinds[-1]
    assert (kind.moe_block, kind.experts, kind.router) == ("mlp", "mlp.experts", "mlp.gate")
    for group in kind.groups:
        reads = group.fold is not None and group.fold.producer == "post_attention_layernorm"
        assert group.other_readers == (("mlp.gate", "mlp.shared_expert_gate") if reads else ())


HYBRID = {"hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 256, "intermediate_size": 192}
HEADS = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}


def test_a_hybrid_has_layers_of_two_kinds() -> None:
    architecture = found("qwen3_5_text", **HYBRID, **HEADS)
    recurrent, attention = architecture.kinds[0], architecture.kinds[3]
    assert groups(recurrent) == {
        "linear_attn.in_proj_qkv linear_attn.in_proj_z <- input_layernorm",
        "linear_attn.out_proj <- linear_attn.norm",
        GATE_UP,
        DOWN,
    }
    assert recurrent.attention == ""
    assert groups(attention) == LLAMA
    assert not any(group.attended for group in recurrent.groups)
    assert architecture.tested
    shared = next(group.fold for group in recurrent.groups if group.linears == ("linear_attn.out_proj",))
    assert shared is not None
    assert (shared.spread.repeats, shared.offset) == (4, 0.0)


def test_factors_and_caps_are_found_and_have_the_configurations_own_numbers() -> None:
    sizes = HYBRID | {"num_hidden_layers": 1}
    granite = found(
        "granite", **sizes, embedding_multiplier=12.0, logits_scaling=8.0, residual_multiplier=0.22
    )
    assert (granite.embedding_factor, granite.logits.factor) == (12.0, 1 / 8)
    assert {group.residual for group in granite.kinds[0].groups} == {""}  # 0.22 of it is added
    assert groups(granite.kinds[0]) == LLAMA
    gemma = found("gemma2", **sizes, final_logit_softcapping=30.0)
    assert (gemma.logits.factor, gemma.logits.cap, gemma.final_norm_offset) == (1.0, 30.0, 1.0)


def test_attention_beside_the_network_has_no_middle() -> None:
    kind = found("cohere2", **HYBRID, num_attention_heads=4, num_key_value_heads=2).kinds[0]
    assert kind.middle == ""
    assert groups(kind) == {QKV, O_PROJ, "mlp.gate_proj mlp.up_proj <- input_layernorm", DOWN}


def test_layers_that_are_told_of_tokens_and_read_what_others_left_are_found() -> None:
    told = found("gemma4_text", **LATE_SHARED | {"hidden_size_per_layer_input": 256})
    assert told.stream == StreamForm(told=(0,), left="shared_kv_states")
    key_value = ("self_attn.k_proj", "self_attn.v_proj")
    assert [kind.leaves for kind in told.kinds] == [(), key_value, key_value, (), ()]
    own, shared = told.kinds[0], told.kinds[3]
    assert groups(own) - groups(shared) == {QKV}
    assert groups(shared) == {
        "self_attn.q_proj <- input_layernorm", "self_attn.o_proj <-", DOWN,
        "mlp.gate_proj mlp.up_proj <- pre_feedforward_layernorm", "per_layer_input_gate <-", "per_layer_projection <-",
    }  # fmt: skip


def test_copies_of_hidden_states_are_found_wherever_they_stand() -> None:
    before = found("gemma3n_text", **LATE_SHARED)
    assert (before.stream.copies, before.stream.copies_first, before.stream.around) == (4, True, True)
    assert any(
        "input_layernorm to self_attn.q_proj" in line for line in before.kinds[0].dropped
    )  # laurel reads it
    config = TOLD["deepseek_v4"]
    behind = find_architecture(config, build_skeleton(config), torch.float32)
    assert (behind.stream.copies, behind.stream.copies_first, behind.stream.told) == (
        3,
        False,
        ("input_ids",),
    )
    assert [kind.routes_alone for kind in behind.kinds] == [
        False,
        True,
        True,
    ]  # the first looks experts up by token
    with pytest.raises(RecipeError, match="choose experts by more than what their router reads"):
        PruneExpertsKind().make(PruneExpertsOptions(keep_experts=4), config, behind, "a model")


GEMMA4 = {
    "num_hidden_layers": 6,
    "vocab_size": 512,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
}


def test_a_part_that_a_configuration_has_not_is_not_in_the_twin() -> None:
    """Gemma 4 without inputs for each layer: `hidden_size_per_layer_input` is 0."""
    kind = found("gemma4_text", **GEMMA4).kinds[0]
    assert groups(kind) == {
        QKV, "self_attn.o_proj <-", "mlp.gate_proj mlp.up_proj <- pre_feedforward_layernorm", DOWN
    }  # fmt: skip


def test_experts_whose_router_does_not_show_are_refused() -> None:
    mixture = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}
    with pytest.raises(ModelError, match="the router of layer 0's experts does not show"):
        found("gemma4_text", **GEMMA4, **mixture)


def test_a_model_that_adds_positions_to_its_embedding_is_refused() -> None:
    with pytest.raises(ModelError, match="gpt2"):
        found("gpt2")


def test_a_model_that_moves_tokens_to_its_embedding_is_given_those_tokens() -> None:
    """Llama 4 does; an embedding without weights is nowhere."""
    config = AutoConfig.for_model("llama4_text", **HYBRID, num_local_experts=4, intermediate_size_mlp=192)
    twin = make_twin(config)
    assert float(twin.first_input.abs().max()) < 10
