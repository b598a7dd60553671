"""A base that is published in FP8 or MXFP4 is quantized to the same bytes as its exactly dequantized twin."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from tests.quantize.edited_bases import Tensors, edited, quick_run, renamed
from tests.quantize.small_runs import recipe_of, tensors_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowbit_core.errors import ModelError
from lowbit_quantize.check.weights import base_of
from lowbit_quantize.model.files.published_floats import from_fp8, from_mxfp4
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.model.weights import WeightFiles
from lowbit_quantize.plan import make_plan

TinyModel = Callable[[str], Path]
Pair = tuple[Tensors, Tensor]  # how a weight is published, by the ends of names, and what it says
FP8_BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
FP8_TENSORS = {"quant_method": "fp8", "activation_scheme": "static"}


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, "format": form}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


def in_blocks(weight: Tensor, rows: int = 128, columns: int = 128) -> Pair:
    """FP8 with a float32 scale for each block; the last ones may be cut off."""
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    numbers, meant = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            block = slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns)
            scales[row, column] = weight[block].abs().max() / 448
            numbers[block] = (weight[block] / scales[row, column]).to(torch.float8_e4m3fn)
            meant[block] = numbers[block].float() * scales[row, column]
    return {"weight": numbers, "weight_scale_inv": scales}, meant


def in_one(weight: Tensor) -> Pair:
    scale = weight.abs().max() / 448
    numbers = (weight / scale).to(torch.float8_e4m3fn)
    beside = {"weight_scale_inv": scale, "input_scale": torch.tensor(0.3)}
    return {"weight": numbers, **beside}, numbers.float() * scale


def in_rows(weight: Tensor) -> Pair:
    scales = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    numbers = (weight / scales.float()).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale": scales}, numbers.float() * scales.float()


def _compressor(form: str) -> Any:
    return BaseCompressor.get_value_from_registry(form)


def in_mxfp4(weight: Tensor) -> Pair:
    """As compressed-tensors packs it; what it means is what compressed-tensors unpacks."""
    args = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    largest = weight.unflatten(-1, (-1, 32)).abs().amax(-1)
    scales = torch.exp2(torch.floor(torch.log2(largest)) - 2)
    packed = _compressor("mxfp4-pack-quantized").compress({"weight": weight, "weight_scale": scales}, scheme)
    stored = {name: tensor for name, tensor in packed.items() if name in ("weight_packed", "weight_scale")}
    plain = _compressor("mxfp4-pack-quantized").decompress(dict(packed), scheme)["weight"]
    return stored, plain.float()


def in_blocks_and_scales(weight: Tensor) -> Pair:
    """MXFP4 as gpt-oss names it."""
    stored, meant = in_mxfp4(weight)
    blocks = stored["weight_packed"].unflatten(-1, (-1, 16))
    return {"weight_blocks": blocks, "weight_scales": stored["weight_scale"]}, meant


CASES: Mapping[str, tuple[dict[str, Any], Callable[[Tensor], Pair]]] = {
    "fp8-blocks": (FP8_BLOCKS, in_blocks),
    "fp8-small-blocks": ({**FP8_BLOCKS, "weight_block_size": [48, 80]}, lambda weight: in_blocks(weight, 48, 80)),
    "fp8-tensor": (FP8_TENSORS, in_one),
    "compressed-rows": (compressed("float-quantized", num_bits=8, type="float", strategy="channel"), in_rows),
    "mxfp4": (compressed("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32), in_mxfp4),
    "mxfp4-blocks": ({"quant_method": "mxfp4"}, in_blocks_and_scales),
}  # fmt: skip


def published(tensors: Tensors, store: Callable[[Tensor], Pair]) -> tuple[Tensors, Tensors]:
    """Every linear of the layers as `store` has it, and the twin."""
    stored, twin = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            parts, meant = store(tensor.float())
            stored.update({f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()})
            twin[name] = meant
        else:
            stored[name] = twin[name] = tensor
    return stored, twin


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_bytes_as_the_dequantized_twin(
    tiny_model: TinyModel, tmp_path: Path, case: str, family: str
) -> None:
    quantization, store = CASES[case]
    tensors, twins = published(tensors_of(tiny_model(family)), store)
    base = edited(
        tiny_model(family), tmp_path / "base", lambda _: tensors, {"quantization_config": quantization}
    )
    twin = edited(tiny_model(family), tmp_path / "twin", lambda _: twins)
    found, meant = quick_run(base, tmp_path / "out"), quick_run(twin, tmp_path / "plain")
    assert found.quality.mean_kld == meant.quality.mean_kld
    one, other = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "plain")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert found.base.dequantized == ("MXFP4" if "mxfp4" in case else found.base.dequantized)
    assert found.base.dequantized is not None
    assert meant.base.dequantized is None
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["format"] == "pack-quantized"


WRAPPED = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "parallel": lambda name: f"module._orig_mod.{name}",
    "layers": lambda name: name.replace(".self_attn.", "._orig_mod.self_attn._checkpoint_wrapped_module."),
    "adapter": lambda name: f"base_model.model._orig_mod.{name}".replace("_proj.", "_proj.base_layer."),
    "bare": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("case", ["fp8-blocks", "compressed-rows", "mxfp4", "mxfp4-blocks"])
def test_wrappers_names_hide_no_numbers(
    tiny_model: TinyModel, tmp_path: Path, case: str, wrapped: str
) -> None:
    quantization, store = CASES[case]
    tensors, twins = published(tensors_of(tiny_model("llama")), store)

    def stored(_: Tensors) -> Tensors:
        return renamed(WRAPPED[wrapped])(tensors)

    config = {"quantization_config": quantization}
    base = edited(tiny_model("llama"), tmp_path / "base", stored, config)
    plan = make_plan(find_model(str(base)), recipe_of("rtn-g64"))
    found = base_of(plan, WeightFiles(base))
    assert not found.rest.carried
    for name, meant in twins.items():
        assert torch.equal(found.weights.read(name).float(), meant.float()), name


def test_stacked_experts_in_fp8_are_read_entry_by_entry(tiny_model: TinyModel, tmp_path: Path) -> None:
    plain = edited(tiny_model("qwen3_moe"), tmp_path / "stacked")
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    (plain / "model.safetensors").unlink()
    model.save_pretrained(plain, save_original_format=False)

    def stack(tensors: Tensors, *, twin: bool) -> Tensors:
        found = dict(tensors)
        for name in [name for name in tensors if ".experts." in name]:
            pairs = [in_blocks(expert.float(), 64, 64) for expert in tensors[name]]
            if twin:
                found[name] = torch.stack([meant for _, meant in pairs])
            else:
                found[name] = torch.stack([parts["weight"] for parts, _ in pairs])
                found[f"{name}_scale_inv"] = torch.stack([parts["weight_scale_inv"] for parts, _ in pairs])
        return found

    quantization = {"quantization_config": {**FP8_BLOCKS, "weight_block_size": [64, 64]}}
    base = edited(plain, tmp_path / "base", lambda tensors: stack(tensors, twin=False), quantization)
    other = edited(plain, tmp_path / "twin", lambda tensors: stack(tensors, twin=True))
    quick_run(base, tmp_path / "out"), quick_run(other, tmp_path / "plain")
    one, two = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "plain")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_draft_layer_in_fp8_is_carried_over_dequantized(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Its numbers would have no scale that the checkpoint's configuration speaks of."""
    tensors, twins = published(tensors_of(tiny_model("llama")), in_blocks)
    for group in (tensors, twins):
        group.update(
            {name.replace(".2.", ".3."): t.clone() for name, t in group.items() if ".layers.2." in name}
        )
    facts = {"quantization_config": FP8_BLOCKS, "num_nextn_predict_layers": 1}
    manifest = quick_run(
        edited(tiny_model("llama"), tmp_path / "base", lambda _: tensors, facts), tmp_path / "out"
    )
    after = tensors_of(tmp_path / "out")
    extra = [name for name in twins if ".layers.3." in name]
    assert manifest.base.carried == sorted(extra)
    assert all(torch.equal(after[name], twins[name].bfloat16()) for name in extra)
    assert not any(name.endswith("weight_scale_inv") for name in after)
    assert manifest.base.left_out["model.layers.0.self_attn.q_proj.weight_scale_inv"].startswith("a scale")


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "already quantized .gptq."),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "already quantized .bitsandbytes."),
        (
            compressed("pack-quantized", num_bits=4, type="int", group_size=32),
            "published in integers of few bits",
        ),
        (compressed("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16), "nvfp4-pack-quantized"),
        (compressed("int-quantized", num_bits=8, type="int"), "already quantized"),
        (
            {"quant_method": "fp8", "weight_block_size": [128]},
            "blocks have a number of rows and one of columns",
        ),
    ],
)
def test_what_would_only_lose_again_is_refused_with_the_reason(
    tiny_model: TinyModel, tmp_path: Path, quantization: dict[str, Any], words: str
) -> None:
    base = edited(tiny_model("llama"), tmp_path / "base", config={"quantization_config": quantization})
    with pytest.raises(ModelError, match=words):
        quick_run(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fp8_numbers_without_a_word_in_the_configuration_are_refused(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    tensors, _ = published(tensors_of(tiny_model("llama")), in_blocks)
    base = edited(tiny_model("llama"), tmp_path / "base", lambda _: tensors)
    with pytest.raises(ModelError, match="stored as F8_E4M3, and its configuration does not say how"):
        quick_run(base, tmp_path / "out")


def test_scales_of_another_shape_than_the_blocks_say_are_refused() -> None:
    with pytest.raises(ModelError, match=r"scales of \(3, 2\)"):
        from_fp8(torch.zeros(128, 128).to(torch.float8_e4m3fn), torch.ones(3, 2), (128, 128))


def test_every_4_bit_float_and_exponent_is_the_standards() -> None:
    """Bytes that hold each of the sixteen codes in both halves, at every exponent of a float32."""
    values = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
    codes = torch.arange(16)
    packed = (codes | (codes.flip(0) << 4)).to(torch.uint8)
    for exponent in (1, 100, 127, 130, 250):
        found = from_mxfp4(packed[None], torch.tensor([[exponent]], dtype=torch.uint8))[0]
        meant = [
            value * 2.0 ** (exponent - 127)
            for pair in zip(values, values[::-1], strict=True)
            for value in pair
        ]
        assert found.tolist() == meant


def test_wrapped_names_and_fp8_go_together(tiny_model: TinyModel, tmp_path: Path) -> None:
    tensors, _ = published(tensors_of(tiny_model("llama")), in_blocks)
    facts = {"quantization_config": FP8_BLOCKS}
    plain = edited(tiny_model("llama"), tmp_path / "plain", lambda _: tensors, facts)
    wrapped = edited(plain, tmp_path / "wrapped", renamed(lambda name: f"_orig_mod.{name}"))
    first, second = quick_run(plain, tmp_path / "one"), quick_run(wrapped, tmp_path / "two")
    assert first.quality.mean_kld == second.quality.mean_kld
