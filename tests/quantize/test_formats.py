"""AutoAWQ's and AutoGPTQ's formats: unpacked by their definition, they hold what the walk measured, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file
from tests.quantize.test_pipeline import CPU, SMALL
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit_core.errors import RecipeError
from lowbit_core.manifest import Manifest
from lowbit_quantize.calibration import load_texts
from lowbit_quantize.formats import FORMATS, check_format
from lowbit_quantize.grid import GridSpec, Rounded, stored
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.plan import make_plan
from lowbit_quantize.recipe import Recipe, load_recipe
from lowbit_quantize.source import find_model

Tensors = dict[str, torch.Tensor]
# Of eight outputs, output i lies in this four-bit field of AutoAWQ's word.
AWQ_FIELD = (0, 4, 1, 5, 2, 6, 3, 7)
CASES = {
    "awq": ("awq-g64-autoawq",),
    "awq-asymmetric": ("awq-g64-autoawq", "weights.symmetric=false"),
    "gptq": ("gptq-g64-autogptq",),
    "gptq-8": ("gptq-g64-autogptq", "weights.bits=8"),
}


def field(words: torch.Tensor, number: int, bits: int) -> np.ndarray:
    return (words.numpy().view(np.uint32) >> np.uint32(number * bits)) & np.uint32((1 << bits) - 1)


def unpacked_awq(linear: Tensors) -> torch.Tensor:
    """(out, in), by the definition of AutoAWQ's GEMM format."""
    inputs, outputs = linear["qweight"].shape[0], linear["scales"].shape[1]
    group_size = inputs // len(linear["scales"])
    weight = torch.empty(outputs, inputs)
    for output in range(outputs):
        word, number = output // 8, AWQ_FIELD[output % 8]
        codes = field(linear["qweight"][:, word].contiguous(), number, 4)
        zeros = field(linear["qzeros"][:, word].contiguous(), number, 4).repeat(group_size)
        steps = torch.from_numpy(codes.astype(np.float32) - zeros.astype(np.float32))
        weight[output] = steps * linear["scales"][:, output].float().repeat_interleave(group_size)
    return weight


def unpacked_gptq(linear: Tensors) -> torch.Tensor:
    """(out, in), by the definition of AutoGPTQ's format, zero points one short."""
    inputs, outputs = len(linear["g_idx"]), linear["scales"].shape[1]
    bits = 32 * linear["qweight"].shape[0] // inputs
    values = 32 // bits
    weight = torch.empty(inputs, outputs)
    zeros = np.stack(
        [field(linear["qzeros"][:, o // values].contiguous(), o % values, bits) for o in range(outputs)],
        axis=1,
    ).astype(np.float32)  # (groups, out)
    for i in range(inputs):
        group = int(linear["g_idx"][i])
        codes = field(linear["qweight"][i // values].contiguous(), i % values, bits).astype(np.float32)
        weight[i] = torch.from_numpy(codes - (zeros[group] + 1)) * linear["scales"][group].float()
    return weight.T


UNPACK: dict[str, Callable[[Tensors], torch.Tensor]] = {"autoawq": unpacked_awq, "autogptq": unpacked_gptq}


def bits_of(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous().view(torch.int32)


def tensors_of(checkpoint: Path) -> Tensors:
    return {
        name: tensor for path in checkpoint.glob("*.safetensors") for name, tensor in load_file(path).items()
    }


def linear_of(tensors: Tensors, name: str) -> Tensors:
    return {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{name}.")}


def dequantized_default(tensors: Tensors, name: str, bits: int) -> torch.Tensor:
    """(out, in) of a linear in compressed-tensors' format, by its own package."""
    linear = linear_of(tensors, name)
    shape = torch.Size(linear["weight_shape"].tolist())
    codes = unpack_from_int32(linear["weight_packed"], bits, shape)
    scale, zero = linear["weight_scale"].float(), linear.get("weight_zero_point")
    if zero is not None:
        zero = unpack_from_int32(zero, bits, torch.Size(scale.shape), packed_dim=0)
    weight: torch.Tensor = dequantize(codes, scale, zero)
    return weight


def run(model: Path, out: Path, name: str, *overrides: str) -> Manifest:
    return quantize(str(model), load_recipe(name, (*SMALL, *overrides)), out, CPU)


def random_linear(spec: GridSpec) -> Rounded:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(spec.lowest, spec.highest + 1, (96, 128), generator=generator).to(torch.int8)
    groups = (96, 128 // (spec.group_size or 128))
    scale = stored(torch.exp(3 * torch.randn(groups, generator=generator) - 4))
    scale[::2] *= -1  # mirrored grids
    zero = torch.zeros(groups)
    if not spec.symmetric:
        zero = torch.randint(spec.lowest, spec.highest + 1, groups, generator=generator).float()
    return Rounded(codes, scale, zero, spec)


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize(
    ("name", "bits", "symmetric"),
    [("autoawq", 4, True), ("autoawq", 4, False), ("autogptq", 4, True), ("autogptq", 8, True)],
)
def test_packing_keeps_every_bit_of_every_weight(
    name: str, bits: int, symmetric: bool, group_size: int
) -> None:
    linear = random_linear(GridSpec(bits, group_size, symmetric))
    packed = FORMATS[name].pack(linear)
    assert torch.equal(bits_of(UNPACK[name](packed)), bits_of(linear.dequantize()))
    assert packed["scales"].dtype == torch.float16
    assert {packed[key].dtype for key in packed if key != "scales"} == {torch.int32}


def test_a_stored_scale_is_exact_in_bfloat16_and_in_float16() -> None:
    scale = torch.exp(torch.linspace(-25, 11, 20001))
    held = stored(scale)
    assert torch.equal(held, held.to(torch.bfloat16).float())
    assert torch.equal(held, held.to(torch.float16).float())
    assert (held != 0).all()
    normal = scale > 2**-17  # below, float16 has fewer bits left than bfloat16
    assert torch.equal(held[normal], scale[normal].to(torch.bfloat16).float())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("case", list(CASES))
def test_a_checkpoint_holds_the_weights_of_its_twin_in_the_default_format(
    tiny_model: Callable[[str], Path], tmp_path: Path, case: str, family: str
) -> None:
    name, *overrides = CASES[case]
    manifest = run(tiny_model(family), tmp_path / "older", name, *overrides)
    twin = run(tiny_model(family), tmp_path / "twin", name, *overrides, "format=compressed-tensors")
    assert manifest.quality.mean_kld == twin.quality.mean_kld
    older, default = tensors_of(tmp_path / "older"), tensors_of(tmp_path / "twin")
    unpack, bits = UNPACK[manifest.recipe["format"]], manifest.recipe["weights"]["bits"]
    for module in manifest.modules:
        ours = unpack(linear_of(older, module.name))
        assert torch.equal(bits_of(ours), bits_of(dequantized_default(default, module.name, bits)))
    others = [key for key in default if not key.rpartition(".")[2].startswith("weight_")]
    assert all(torch.equal(default[key], older[key]) for key in others)
    assert any(key.endswith("q_proj.bias") for key in others) == (family == "qwen2")


@pytest.mark.parametrize("case", ["awq-asymmetric", "gptq"])
def test_what_is_unpacked_diverges_from_the_base_as_the_manifest_says(
    tiny_model: Callable[[str], Path], tmp_path: Path, case: str
) -> None:
    name, *overrides = CASES[case]
    manifest = run(tiny_model("qwen2"), tmp_path / "out", name, *overrides)
    tensors = tensors_of(tmp_path / "out")
    base, served = (
        AutoModelForCausalLM.from_pretrained(tiny_model("qwen2"), dtype=torch.bfloat16) for _ in range(2)
    )
    state = {key: value for key, value in tensors.items() if key in served.state_dict()}
    for module in manifest.modules:
        weight = UNPACK[manifest.recipe["format"]](linear_of(tensors, module.name))
        state[f"{module.name}.weight"] = weight.to(torch.bfloat16)
    served.load_state_dict(state)
    recipe = Recipe.model_validate(manifest.recipe)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("qwen2"))
    ids = load_texts(recipe.calibration, recipe.quality, tokenizer, 512)[1].ids
    with torch.inference_mode():
        p, q = (torch.log_softmax(model(ids).logits[:, :-1].double(), -1) for model in (base, served))
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(manifest.quality.mean_kld, abs=1e-3)


def test_the_configuration_says_what_readers_ask_for(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    run(tiny_model("llama"), tmp_path / "awq", "awq-g64-autoawq", "weights.ignore=['re:.*0.*o_proj']")
    run(tiny_model("llama"), tmp_path / "gptq", "gptq-g64-autogptq")
    awq, gptq = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("awq", "gptq"))
    assert awq["dtype"] == gptq["dtype"] == "bfloat16"
    assert awq["quantization_config"] == {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 64, "zero_point": True,
        "modules_to_not_convert": ["lm_head", "model.layers.0.self_attn.o_proj"],
    }  # fmt: skip
    assert gptq["quantization_config"] == {
        "quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 64, "sym": True,
        "desc_act": False, "static_groups": True,
    }  # fmt: skip
    tool_file = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    assert tool_file == gptq["quantization_config"]
    assert not (tmp_path / "awq" / "quantize_config.json").exists()


@pytest.mark.parametrize("name", ["awq-g64-autoawq", "gptq-g64-autogptq"])
def test_an_fp8_cache_is_measured_with_unit_scales_and_the_manifest_says_so(
    tiny_model: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    manifest = run(tiny_model("llama"), tmp_path / "fp8", name, "kv_cache.dtype=fp8")
    plain = run(tiny_model("llama"), tmp_path / "none", name)
    assert manifest.kv_cache is not None
    assert manifest.kv_cache.source == f"unit scales: the {manifest.recipe['format']} format carries none"
    assert {(layer.k_scale, layer.v_scale) for layer in manifest.kv_cache.layers} == {(1.0, 1.0)}
    assert len(manifest.kv_cache.layers) == 3
    assert manifest.quality.kv_cache_included
    assert manifest.quality.mean_kld != plain.quality.mean_kld
    assert plain.kv_cache is None
    assert not [key for key in tensors_of(tmp_path / "fp8") if key.endswith(("k_scale", "v_scale"))]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("weights.bits=8", "weights.bits = 8: format: autoawq holds 4 bits; use format: compressed-tensors"),
        ("weights.group_size=96", "weights.group_size = 96: vLLM reads .* in groups of 32, 64, 128 only"),
        ("weights.method=none", "weights.method = none: format: autoawq holds quantized linears only"),
    ],
)
def test_what_autoawqs_format_cannot_hold_is_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_format(load_recipe("awq-g64-autoawq", (override,)), SimpleNamespace(), {}, {})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "weights.symmetric=false",
            "weights.symmetric = false: vLLM refuses asymmetric .* set it to true, or",
        ),
        (
            'weights.ignore=["re:.*1.*o_proj"]',
            "weights.ignore leaves model.layers.1.self_attn.o_proj as it is",
        ),
    ],
)
def test_what_autogptqs_format_cannot_hold_is_refused_before_the_walk(
    tiny_model: Callable[[str], Path], override: str, message: str
) -> None:
    recipe = load_recipe("gptq-g64-autogptq", (*SMALL, override))
    with pytest.raises(RecipeError, match=message):
        make_plan(find_model(str(tiny_model("llama"))), recipe)


@pytest.mark.parametrize("name", ["awq-g64-autoawq", "gptq-g64-autogptq"])
def test_experts_and_odd_outputs_are_refused_in_the_older_formats(name: str) -> None:
    recipe, linears = load_recipe(name), {"x": torch.nn.Linear(64, 48)}
    with pytest.raises(RecipeError, match="is for dense models and this one has experts"):
        check_format(recipe, SimpleNamespace(num_experts=16), {}, {})
    with pytest.raises(RecipeError, match="packs outputs in blocks of 32 and x has 48"):
        check_format(recipe, SimpleNamespace(), linears, linears)
