"""Models that read pictures too: the decoder is walked, towers are carried over, configurations stay whole."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.quantize.edited_bases import Tensors, edited
from tests.quantize.small_runs import recipe_of, tensors_of
from tests.quantize.tiny_families import FAMILIES, saved_family
from transformers import AutoConfig

from lowbit_core.errors import ModelError
from lowbit_quantize.check import forecast
from lowbit_quantize.check.weights import Base, base_of
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.model.skeleton import build_skeleton, is_tied
from lowbit_quantize.model.weights import WeightFiles
from lowbit_quantize.plan import Plan
from lowbit_quantize.run.companions import companions
from lowbit_quantize.run.served_config import quantization_config, served_config
from lowbit_quantize.schemes.integer import PRESETS

Saved = Callable[[str], Path]
WRAPPERS = [name for name, family in FAMILIES.items() if family.wrapper]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    def save(family: str) -> Path:
        saved_family(directory := tmp_path_factory.mktemp(family), family)
        return directory

    return cache(save)


def plan_of(family: str, directory: Path) -> Plan:
    """A plan that quantizes nothing."""
    reference, architecture = find_model(str(directory)), FAMILIES[family].architecture(family)
    skeleton = build_skeleton(reference.config)
    return Plan(reference, recipe_of("rtn-g64"), architecture, skeleton, {}, ())


def written(plan: Plan, base: Base) -> Tensors:
    """What a checkpoint without anything quantized has."""
    names = base.weights.wanted.names
    skip = {f"{plan.architecture.head}.weight"} if is_tied(plan.skeleton, plan.architecture) else set()
    text = {
        name: base.weights.read(name).to(plan.kept_types.dtype(name, plan.dtype))
        for name in base.weights.wanted.text - skip
    }
    return names.publish(text) | {name: base.read_carried(name, plan.dtype) for name in base.rest.carried}


@pytest.mark.parametrize("family", WRAPPERS)
def test_towers_are_carried_over_to_the_last_bit_in_their_type_and_the_text_is_cast(
    saved: Saved, family: str
) -> None:
    plan, before = plan_of(family, saved(family)), tensors_of(saved(family))
    base = base_of(plan, WeightFiles(saved(family)))
    after = written(plan, base)
    assert after.keys() == before.keys()
    assert base.rest.carried
    assert not base.foreign
    for name, tensor in after.items():
        if name in base.rest.carried:
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, before[name]), name
        else:
            assert torch.equal(tensor, before[name].to(tensor.dtype)), name


@pytest.mark.parametrize("family", ["mistral3", "deepseek_v3", "deepseek_v4", "gpt_oss", "llama"])
def test_the_forecast_counts_what_stays_float32_and_what_is_carried_over(saved: Saved, family: str) -> None:
    plan = plan_of(family, saved(family))
    base = base_of(plan, WeightFiles(saved(family)))
    after = written(plan, base)
    counted = sum(tensor.bytes for tensor in forecast.tensors(plan)) + base.carried_bytes
    assert counted == sum(tensor.nbytes for tensor in after.values())
    wide = {
        name for name, tensor in after.items() if tensor.dtype == torch.float32
    } - base.rest.carried.keys()
    assert bool(wide) == family.startswith("deepseek")
    assert all(
        "norm" in name or "bias" in name or "hc_" in name or "ape" in name or "sink" in name for name in wide
    )


def test_a_tower_that_lacks_a_tensor_is_refused(saved: Saved, tmp_path: Path) -> None:
    base = edited(
        saved("gemma3"),
        tmp_path / "base",
        lambda tensors: {name: t for name, t in tensors.items() if "mm_soft_emb_norm" not in name},
    )
    with pytest.raises(ModelError, match=r"lacks the tensor multi_modal_projector\.mm_soft_emb_norm\.weight"):
        base_of(plan_of("gemma3", base), WeightFiles(base))


@pytest.mark.parametrize("prefix", ["language_model.model", "model.language_model"])
def test_a_parameter_inside_the_decoder_that_nobody_asked_for_is_refused(
    saved: Saved, tmp_path: Path, prefix: str
) -> None:
    name = f"{prefix}.layers.1.self_attn.q_proj.bias"
    base = edited(saved("mistral3"), tmp_path / "base", lambda tensors: tensors | {name: torch.ones(64)})
    with pytest.raises(ModelError, match=f"holds {name}, which its configuration does not ask for"):
        base_of(plan_of("mistral3", base), WeightFiles(base))


def test_names_of_before_and_of_today_are_read_alike(saved: Saved, tmp_path: Path) -> None:
    """transformers 4.52 put `model.` before a wrapper's parts."""

    def today(name: str) -> str:
        name = name.replace("language_model.model.", "model.language_model.")
        parts = ("vision_tower.", "multi_modal_projector.")
        return (
            f"model.{name}" if name.startswith(parts) else name.replace("language_model.lm_head", "lm_head")
        )

    base = edited(
        saved("mistral3"), tmp_path / "base", lambda tensors: {today(name): t for name, t in tensors.items()}
    )
    one, other = (plan_of("mistral3", path) for path in (saved("mistral3"), base))
    before, after = base_of(one, WeightFiles(saved("mistral3"))), base_of(other, WeightFiles(base))
    for name in before.weights.wanted.text:
        assert torch.equal(before.weights.read(name), after.weights.read(name)), name
    assert not after.foreign
    assert {today(name) for name in before.rest.carried} == set(after.rest.carried)


def test_a_wrappers_configuration_stays_whole_and_says_at_its_top_what_is_quantized(saved: Saved) -> None:
    plan = plan_of("qwen3_5_moe", saved("qwen3_5_moe"))
    config, given = plan.reference.config, plan.reference.written_config
    assert given is not None
    scheme = next(preset for preset in PRESETS if preset.name == "W4A16").make(32)
    inner = "model.language_model.layers.1.self_attn.q_proj"
    names = plan.architecture.engine_names(inner, plan.names.published(inner))
    quantization = quantization_config(dict.fromkeys(names, scheme), [], fp8_cache=False)
    found = served_config(config, given, {"num_experts": 3}, quantization, torch.bfloat16, "Nobody")
    assert found["architectures"] == given["architectures"]
    assert found["vision_config"] == given["vision_config"]
    assert found["text_config"] == {**given["text_config"], "num_experts": 3}
    assert "num_experts" not in found
    assert found["quantization_config"]["config_groups"]["group_0"]["targets"] == [inner]
    again = AutoConfig.for_model(
        **{key: value for key, value in found.items() if key != "quantization_config"}
    )
    assert again.text_config.num_experts == 3
    assert given["text_config"]["num_experts"] == 4  # what was given is as it was


def test_a_wrapper_with_a_quantized_cache_says_at_its_top_how_many_heads_there_are(saved: Saved) -> None:
    """compressed-tensors 0.17 does not look into the decoder's part, and transformers then opens nothing."""
    for family, told in (("mistral3", True), ("llama", False)):
        plan = plan_of(family, saved(family))
        for fp8_cache in (True, False):
            quantization = quantization_config({}, ["lm_head"], fp8_cache=fp8_cache)
            found = served_config(
                plan.reference.config, {"model_type": family}, {}, quantization, torch.bfloat16, "Nobody"
            )
            heads = {
                key: found.get(key) for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
            }
            assert list(heads.values()) == ([4, 2, 16] if told and fp8_cache else [None] * 3)


def test_a_linear_is_named_as_it_is_published_and_as_transformers_has_it(saved: Saved) -> None:
    plan = plan_of("mistral3", saved("mistral3"))
    inner, published = (
        "model.language_model.layers.1.mlp.up_proj",
        "language_model.model.layers.1.mlp.up_proj",
    )
    assert plan.architecture.engine_names(inner, plan.names.published(inner)) == (published, inner)


def test_files_of_processors_go_along(saved: Saved, tmp_path: Path) -> None:
    names = (
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
        "chat_template.jinja",
        "chat_template.json",
    )
    base = edited(saved("mistral3"), tmp_path / "base", files=dict.fromkeys(names, "{}"))
    assert set(names) <= set(companions(base, WeightFiles(base).files).copied)


def test_a_float16_wrapper_is_read_in_float16(saved: Saved, tmp_path: Path) -> None:
    base = edited(saved("gemma3"), tmp_path / "base", config={"dtype": "float16"})
    path = base / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    plan = plan_of("gemma3", base)
    assert plan.dtype == torch.float16
    assert {tensor.dtype for tensor in written(plan, base_of(plan, WeightFiles(base))).values()} == {
        torch.float16
    }
