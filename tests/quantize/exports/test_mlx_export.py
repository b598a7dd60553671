"""MLX's layout: the same numbers, unpacked by its own rule; benchmarks/formats runs MLX and mlx-lm themselves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantize.small_runs import CPU, recipe_with, tensors_of
from tests.tiny_models import write_tiny_model
from torch import Tensor

from lowbit_core.cli import main
from lowbit_core.errors import CheckpointError
from lowbit_core.manifest import read_manifest
from lowbit_core.manifest_files import verify_files
from lowbit_quantize.catalog import CATALOG
from lowbit_quantize.export.checkpoint import Checkpoint
from lowbit_quantize.export.exporter import export
from lowbit_quantize.export.mlx import Mlx
from lowbit_quantize.pipeline import quantize

FOUR: dict[str, Any] = {"match": "*", "scheme": "W4A16", "group_size": 64, "methods": ["rtn"]}
EIGHT = {**FOUR, "scheme": "W8A16"}
PLAIN = {"match": "*", "scheme": "none"}
ALONE = {"match": "*.0.mlp.*", "scheme": "none"}


def checkpoint_of(place: Path, *rules: dict[str, Any], family: str = "llama", cache: str = "none") -> Path:
    base = write_tiny_model(place / "base", family)
    sections = {"kv_cache": {"dtype": cache}, **({"passes": []} if rules == (PLAIN,) else {})}
    quantize(str(base), recipe_with(*rules, **sections), place / "checkpoint", CPU)
    return place / "checkpoint"


def unpacked(tensors: dict[str, Tensor], name: str, quantization: dict[str, Any]) -> Tensor:
    """The weight of a linear, float32, (out, in), as MLX's documentation of `quantize` says."""
    said = quantization.get(name, quantization)
    words, bits = tensors[f"{name}.weight"], said["bits"]
    assert words.dtype == torch.uint32
    fields = torch.arange(0, 32, bits)
    codes = (words.view(torch.int32).long().unsqueeze(-1) >> fields & (1 << bits) - 1).flatten(-2)
    scale, bias = (tensors[f"{name}.{part}"].float() for part in ("scales", "biases"))
    groups = codes.view(len(codes), -1, said["group_size"])
    weight: Tensor = (groups * scale.unsqueeze(-1) + bias.unsqueeze(-1)).flatten(-2)
    return weight


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([FOUR], {"group_size": 64, "bits": 4}),
        ([{**FOUR, "group_size": 32}], {"group_size": 32, "bits": 4}),
        ([{**EIGHT, "group_size": "channel"}], {"group_size": 128, "bits": 8}),
        ([FOUR, {**EIGHT, "match": "*.down_proj", "group_size": 32}, ALONE], {"group_size": 64, "bits": 4}),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_number_is_the_checkpoints(
    rules: list[dict[str, Any]], said: dict[str, Any], family: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(checkpoint_of(tmp_path, *rules, family=family), CATALOG)
    manifest = export(checkpoint.directory, Mlx(), tmp_path / "out")
    tensors, before = tensors_of(tmp_path / "out"), tensors_of(checkpoint.directory)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    assert {key: config["quantization"][key] for key in ("group_size", "bits", "mode")} == said | {
        "mode": "affine"
    }
    for name in checkpoint.schemes:
        assert torch.equal(
            unpacked(tensors, name, config["quantization"]), checkpoint.linear(name).dequantize()
        )
        assert tensors[f"{name}.scales"].dtype == tensors[f"{name}.biases"].dtype == torch.bfloat16
    others = [
        name for name in before if name.rpartition(".")[0] not in checkpoint.schemes or name.endswith("bias")
    ]
    assert all(torch.equal(before[name], tensors[name]) for name in others)
    assert len(tensors) == len(others) + 3 * len(checkpoint.schemes)
    assert (ALONE in rules) == ("model.layers.0.mlp.up_proj.weight" in others)
    verify_files(tmp_path / "out", manifest, hashes=True)


@pytest.mark.parametrize(
    ("family", "layer", "last"), [("qwen3_moe", "mlp", "down_proj"), ("mixtral", "block_sparse_moe", "w2")]
)
def test_experts_lie_in_one_tensor_for_each_projection(
    family: str, layer: str, last: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(checkpoint_of(tmp_path, FOUR, family=family), CATALOG)
    export(checkpoint.directory, Mlx(), tmp_path / "out")
    tensors = tensors_of(tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    place = f"model.layers.1.{layer}.switch_mlp.down_proj"
    weight = tensors[f"{place}.weight"]
    assert weight.dtype == torch.uint32
    for expert in range(8):
        parts = {f"{place}.{part}": tensors[f"{place}.{part}"][expert] for part in ("scales", "biases")}
        parts[f"{place}.weight"] = weight.view(torch.int32)[expert].view(torch.uint32)
        before = checkpoint.linear(f"model.layers.1.{layer}.experts.{expert}.{last}").dequantize()
        assert torch.equal(unpacked(parts, place, said), before)
    assert not [name for name in tensors if ".experts." in name]


def test_what_is_another_than_most_is_named(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, FOUR, {**EIGHT, "match": "*.o_proj"})
    export(checkpoint, Mlx(), tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    other = {"group_size": 64, "bits": 8, "mode": "affine"}
    assert {name: said[name] for name in said if "." in name} == {
        f"model.layers.{number}.self_attn.o_proj": other for number in range(3)
    }


def test_a_channel_is_cut_into_the_largest_groups_that_divide_it(tmp_path: Path) -> None:
    """down_proj has 192 inputs: groups of 64, where the others have 128."""
    checkpoint = checkpoint_of(tmp_path, {**EIGHT, "group_size": "channel"})
    export(checkpoint, Mlx(), tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert (said["group_size"], said["model.layers.1.mlp.down_proj"]["group_size"]) == (128, 64)


def test_the_command_says_what_is_left_out_and_the_card_how_to_run_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, out = checkpoint_of(tmp_path, FOUR, cache="fp8"), tmp_path / "out"
    capsys.readouterr()
    assert main(["export", str(checkpoint), "--to", "mlx", "--out", str(out)]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["to"], said["left_out"]) == ("mlx", ["scales of an FP8 KV cache"])
    assert said["linear_bits_per_weight"] == 4.5
    assert not [name for name in tensors_of(out) if name.endswith(("k_scale", "v_scale"))]
    card = (out / "README.md").read_text()
    assert "mlx_lm.server --model ./DIRECTORY" in card
    assert "library_name: mlx" in card
    assert "vllm serve" not in card
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.kv_cache is None


@pytest.mark.parametrize(
    ("rule", "family", "says"),
    [
        ({**FOUR, "scheme": "W4A16_ASYM"}, "llama", r"\d+ of \d+ biases of model.* are no bfloat16"),
        ({"match": "*", "scheme": "W8A8"}, "llama", r"\d+ of \d+ scales of model.* are no bfloat16"),
        ({"match": "*", "scheme": "FP8_DYNAMIC"}, "llama", "is stored as FP8_DYNAMIC"),
        ({**FOUR, "group_size": 32}, "deepseek_v2", "knows glm4_moe, mixtral, .*, not deepseek_v2"),
        (PLAIN, "llama", "this checkpoint has none"),
    ],
)
def test_what_would_come_out_otherwise_is_refused_and_nothing_is_written(
    rule: dict[str, Any], family: str, says: str, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(tmp_path, rule, family=family)
    with pytest.raises(CheckpointError, match=says):
        export(checkpoint, Mlx(), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "checkpoint"]
