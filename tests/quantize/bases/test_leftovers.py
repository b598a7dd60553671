"""Every tensor of a base is used, carried over untouched, or named as left out; none is lost without a word."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.quantize.edited_bases import Tensors, edited, quick_run, renamed
from tests.quantize.small_runs import stored_bytes, tensors_of
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lowbit_core.errors import ModelError
from lowbit_quantize.check.preflight import dry_run
from lowbit_quantize.recipe import load_recipe

TinyModel = Callable[[str], Path]


def draft(tensors: Tensors) -> Tensors:
    """One layer more, and what joins a draft layer to the model, some of it in float32."""
    last = {
        name.replace(".layers.2.", ".layers.3."): t.clone()
        for name, t in tensors.items()
        if ".layers.2." in name
    }
    joins = {
        "model.layers.3.eh_proj.weight": torch.randn(128, 256).bfloat16(),
        "model.layers.3.enorm.weight": torch.randn(128),
    }
    return tensors | last | joins


def test_a_draft_layer_is_carried_over_to_the_last_bit_and_named_unquantized(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = edited(tiny_model("llama"), tmp_path / "base", draft, {"num_nextn_predict_layers": 1})
    manifest = quick_run(base, tmp_path / "out")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    extra = {name for name in before if ".layers.3." in name}
    assert set(manifest.base.carried) == extra
    assert all(
        torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in extra
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    ignored = config["quantization_config"]["ignore"]
    assert {"model.layers.3.eh_proj", "model.layers.3.self_attn.q_proj"} <= set(ignored)


def test_a_draft_layer_that_is_left_out_is_named_and_the_configuration_has_none(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = edited(tiny_model("llama"), tmp_path / "base", draft, {"num_nextn_predict_layers": 1})
    manifest = quick_run(base, tmp_path / "out", "base.leave_out=model.layers.3.*")
    assert not manifest.base.carried
    assert "model.layers.3.eh_proj.weight" in manifest.base.left_out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0
    assert not any(".layers.3." in name for name in tensors_of(tmp_path / "out"))


def test_more_layers_than_the_configuration_has_are_refused_with_what_is_left_over(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = edited(tiny_model("llama"), tmp_path / "base", config={"num_hidden_layers": 2})
    with pytest.raises(
        ModelError, match=r"model\.layers\.2\..*has 2 layers.*--leave-out 'model.layers.2.\*'"
    ):
        quick_run(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.o_proj.bias",
        "model.layers.0.mlp.up_proj.lora_A",
        "model.norm.bias",
        "lm_head.bias",
    ],
)
def test_a_parameter_inside_that_the_configuration_does_not_ask_for_is_refused(
    tiny_model: TinyModel, tmp_path: Path, name: str
) -> None:
    base = edited(tiny_model("qwen3"), tmp_path / "base", lambda tensors: tensors | {name: torch.ones(128)})
    with pytest.raises(ModelError, match=f"holds {name}, which its configuration does not ask for"):
        quick_run(base, tmp_path / "out")
    left = quick_run(base, tmp_path / "out", f"base.leave_out=['{name}']").base.left_out
    assert left[name].startswith("asked")


def test_what_lies_outside_of_the_model_is_carried_over(tiny_model: TinyModel, tmp_path: Path) -> None:
    extra = {"v_head.summary.weight": torch.randn(1, 128), "model.visual.patch.weight": torch.randn(4, 4)}
    base = edited(tiny_model("qwen2"), tmp_path / "base", lambda tensors: tensors | extra)
    manifest = quick_run(base, tmp_path / "out")
    assert manifest.base.carried == sorted(extra)
    after = tensors_of(tmp_path / "out")
    assert all(torch.equal(after[name], tensor) for name, tensor in extra.items())
    assert manifest.size.bytes == stored_bytes(tmp_path / "out")
    assert dry_run(str(base), load_recipe("rtn-g64"), 24.0, 1 << 30)["tensor_bytes"] == manifest.size.bytes


def test_a_reward_model_stays_one(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Tied, so that it gives next tokens as well; its head for scores is what it was."""
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_model("llama"), num_labels=3, dtype=torch.bfloat16, pad_token_id=0
    )
    base = edited(tiny_model("llama"), tmp_path / "base")
    (base / "model.safetensors").unlink()
    model.save_pretrained(base)
    quick_run(base, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(again.score.weight, model.score.weight)


def test_a_model_without_a_head_is_refused_with_the_reason(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = edited(
        tiny_model("mistral"),
        tmp_path / "base",
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"},
    )
    with pytest.raises(ModelError, match="no next tokens, by which quality is measured"):
        quick_run(base, tmp_path / "out")


def test_computed_buffers_of_old_files_are_left_out_by_name(tiny_model: TinyModel, tmp_path: Path) -> None:
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
        "model.position_ids": torch.arange(64).view(1, -1),
    }
    base = edited(tiny_model("llama"), tmp_path / "base", lambda tensors: tensors | buffers)
    left_out = quick_run(base, tmp_path / "out").base.left_out
    assert {left_out[name] for name in buffers} == {"a buffer that is computed"}


def test_a_pattern_that_leaves_nothing_out_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"base.leave_out: 'mtp\.\*' matches no tensor"):
        quick_run(tiny_model("llama"), tmp_path / "out", "base.leave_out=mtp.*")


@pytest.mark.parametrize(
    ("change", "family"),
    [
        (lambda name: name.removeprefix("model."), "qwen3"),
        (lambda name: f"_orig_mod.{name}", "llama"),
        (lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."), "qwen2"),
        (lambda name: f"module.{name}", "phi3"),
        (lambda name: f"base_model.model.{name}", "mistral"),
        (lambda name: name.replace("model.embed_tokens", "lm_head"), "llama"),
        (lambda name: name.replace("model.", "module._orig_mod.", 1), "qwen3_moe"),
    ],
)
def test_names_as_people_save_them_give_the_same_checkpoint(
    tiny_model: TinyModel, tmp_path: Path, change: Callable[[str], str], family: str
) -> None:
    plain = quick_run(tiny_model(family), tmp_path / "plain")
    base = edited(tiny_model(family), tmp_path / "base", renamed(change))
    other = quick_run(base, tmp_path / "out")
    assert other.quality.mean_kld == plain.quality.mean_kld
    before, after = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v2", "qwen2_moe", "olmoe"])
def test_experts_stacked_as_transformers_writes_them_give_the_same_checkpoint(
    tiny_model: TinyModel, tmp_path: Path, family: str
) -> None:
    plain = quick_run(tiny_model(family), tmp_path / "plain")
    base = edited(tiny_model(family), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, save_original_format=False)
    other = quick_run(base, tmp_path / "out")
    assert other.quality.mean_kld == plain.quality.mean_kld
    before, after = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
