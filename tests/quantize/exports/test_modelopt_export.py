"""ModelOpt's layout: the same numbers, unpacked by its own rule; benchmarks/formats runs its packer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantize.small_runs import CPU, recipe_with, tensors_of
from tests.tiny_models import write_tiny_model
from torch import Tensor

from lowbit_core.errors import CheckpointError
from lowbit_quantize.catalog import CATALOG
from lowbit_quantize.export.checkpoint import Checkpoint
from lowbit_quantize.export.exporter import export
from lowbit_quantize.export.modelopt import FILE, ModelOpt
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.schemes.storage.packed_fp4 import unpacked_fp4

GROUPED: dict[str, Any] = {"scheme": "W4A16", "group_size": 64, "methods": ["rtn"]}


def exported(place: Path, *rules: dict[str, Any], family: str = "llama", cache: str = "fp8") -> Checkpoint:
    base = write_tiny_model(place / "base", family)
    quantize(str(base), recipe_with(*rules, kv_cache={"dtype": cache}), place / "checkpoint", CPU)
    export(place / "checkpoint", ModelOpt(), place / "out")
    return Checkpoint(place / "checkpoint", CATALOG)


def unpacked(parts: dict[str, Tensor]) -> Tensor:
    """The weight of a linear, float32, (out, in)."""
    weight, scale = parts["weight"], parts["weight_scale"]
    if scale.dtype in (torch.float8_e4m3fn, torch.uint8):  # of blocks
        numbers = unpacked_fp4(weight, torch.float32) if weight.dtype == torch.uint8 else weight.float()
        exponents = scale.dtype == torch.uint8
        factors = torch.exp2(scale.float() - 127) if exponents else scale.float() * parts["weight_scale_2"]
        blocks: Tensor = numbers.unflatten(1, (scale.shape[1], -1)) * factors.unsqueeze(-1)
        return blocks.flatten(1)
    if weight.dtype == torch.float8_e4m3fn:
        return weight.float() * (scale.unsqueeze(-1) if scale.dim() else scale)
    rows = torch.stack((weight & 15, weight >> 4), dim=1).flatten(0, 1).int()
    signed = torch.where(rows > 7, rows - 16, rows)
    return signed * scale.repeat_interleave(signed.shape[1] // scale.shape[1], dim=1)


@pytest.mark.parametrize(
    "rules",
    [
        [{"match": "*", **GROUPED}],
        [{"match": "*", "scheme": "FP8"}],
        [{"match": "*", "scheme": "FP8_DYNAMIC"}],
        [{"match": "*", **GROUPED}, {"match": "*.down_proj", "scheme": "FP8"}],
        [{"match": "*", "scheme": "NVFP4", "methods": ["gptq"]}],
        [
            {"match": "*", "scheme": "NVFP4A16", "methods": ["gptq"]},
            {"match": "*.down_proj", "scheme": "MXFP8"},
        ],
    ],
)
def test_every_number_is_the_checkpoints(rules: list[dict[str, Any]], tmp_path: Path) -> None:
    checkpoint, tensors = exported(tmp_path, *rules), tensors_of(tmp_path / "out")
    assert len(checkpoint.schemes) == 21
    for name in checkpoint.schemes:
        of_linear = (key for key in tensors if key.rpartition(".")[0] == name)
        parts = {key.rpartition(".")[2]: tensors[key] for key in of_linear}
        found = checkpoint.linear(name)
        assert torch.equal(unpacked(parts), found.dequantize())
        assert ("input_scale" in parts) == (found.input_scale is not None)
        assert all(parts[part].dim() == 0 for part in ("weight_scale_2", "input_scale") if part in parts)
        if "weight_scale_2" in parts and found.input_scale is not None:
            assert float(parts["input_scale"]) == 1 / found.input_scale
    before = tensors_of(checkpoint.directory)
    for number in range(3):
        for letter in "kv":
            own = before[f"model.layers.{number}.self_attn.{letter}_scale"]
            assert tensors[f"model.layers.{number}.self_attn.{letter}_proj.{letter}_scale"] == own


def test_the_file_says_what_is_left_alone_and_how_the_cache_is_kept(tmp_path: Path) -> None:
    exported(tmp_path, {"match": "*.mlp.*", **GROUPED}, cache="none")
    said = json.loads((tmp_path / "out" / FILE).read_text())["quantization"]
    assert (said["quant_algo"], said["group_size"], said["kv_cache_quant_algo"]) == ("W4A16_AWQ", 64, None)
    assert "lm_head" in said["exclude_modules"]
    assert "model.layers.0.self_attn.q_proj" in said["exclude_modules"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["quant_algo"]) == ("modelopt", "W4A16_AWQ")
    assert "kv_cache_scheme" not in config


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"scheme": "W8A8"}, "no place for .* in W8A8"),
        ({"scheme": "W4A16_ASYM", "group_size": 64, "methods": ["rtn"]}, "in W4A16_ASYM"),
        ({"scheme": "W8A16", "group_size": 64, "methods": ["rtn"]}, "in W8A16"),
    ],
)
def test_what_it_has_no_place_for_is_refused(rule: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=says):
        exported(tmp_path, {"match": "*", **rule})
    assert not (tmp_path / "out").exists()


def test_experts_lie_one_by_one(tmp_path: Path) -> None:
    exported(tmp_path, {"match": "*", **GROUPED}, family="qwen3_moe")
    assert tensors_of(tmp_path / "out")["model.layers.1.mlp.experts.3.up_proj.weight"].dtype == torch.uint8
