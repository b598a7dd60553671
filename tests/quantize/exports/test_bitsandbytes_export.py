"""NF4 and INT8: by their definition the nearest numbers to the base's; benchmarks/formats runs bitsandbytes itself."""

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
from lowbit_quantize.export.bitsandbytes import BLOCK, QUANTILES, BitsAndBytes, int8, nf4
from lowbit_quantize.export.exporter import export
from lowbit_quantize.pipeline import quantize

FOUR: dict[str, Any] = {"match": "*", "scheme": "W4A16", "group_size": 64, "methods": ["rtn"]}
ALONE = {"match": "*.1.mlp.*", "scheme": "none"}


def checkpoint_of(place: Path, family: str = "llama") -> Path:
    base = write_tiny_model(place / "base", family)
    quantize(str(base), recipe_with(FOUR, ALONE), place / "checkpoint", CPU)
    return place / "checkpoint"


def unpacked(parts: dict[str, Tensor]) -> Tensor:
    """A weight, float32, from its tensors by the last part of each name."""
    if "SCB" in parts:
        return parts["weight"].float() * parts["SCB"].unsqueeze(1) / 127
    state = json.loads(bytes(parts["weight.quant_state.bitsandbytes__nf4"].tolist()))
    packed = parts["weight"].flatten().int()
    codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten()
    numbers = torch.Size(state["shape"]).numel()
    absmax = parts["weight.absmax"].repeat_interleave(state["blocksize"])[:numbers]
    return (parts["weight.quant_map"][codes[:numbers]] * absmax).view(state["shape"])


@pytest.mark.parametrize("shape", [(32, 64), (5, 96), (3, 33)])
def test_each_number_is_the_nearest_that_its_block_has(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    found, numbers = unpacked(nf4(weight)), weight.numel()
    flat = weight.flatten()
    for start in range(0, numbers, BLOCK):
        block = flat[start : start + BLOCK]
        grid = torch.tensor(QUANTILES) * block.abs().max()
        nearest = (block.unsqueeze(1) - grid).abs().amin(dim=1)
        torch.testing.assert_close((found.flatten()[start : start + BLOCK] - block).abs(), nearest)


def test_rows_of_int8_err_by_half_a_step_at_most() -> None:
    weight = torch.randn((16, 96), generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    parts = int8(weight)
    apart = (unpacked(parts) - weight.half().float()).abs()
    assert bool((apart <= parts["SCB"].unsqueeze(1) / 127 * 0.501).all())
    assert not parts["weight"][3].any()


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.5), ("int8", 8)])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_linears_of_the_checkpoint_are_made_of_the_base_and_the_rest_is_the_bases(
    kind: str, bits: float, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, out = checkpoint_of(tmp_path, family), tmp_path / "out"
    capsys.readouterr()
    flags = ["export", str(checkpoint), "--to", "bitsandbytes", "--out", str(out), "--format", kind]
    assert main([*flags, "--base", str(tmp_path / "base")]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "quantized anew" in said["left_out"][0]
    assert said["linear_bits_per_weight"] == pytest.approx(bits, abs=0.3)
    tensors, base = tensors_of(out), tensors_of(tmp_path / "base")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["load_in_4bit"], config["load_in_8bit"]) == (kind == "nf4", kind == "int8")
    assert {"lm_head", "model.embed_tokens", "model.layers.1.mlp.up_proj"} <= set(
        config["llm_int8_skip_modules"]
    )
    packed = [
        name
        for name, one in tensors.items()
        if name.endswith(".weight") and one.dtype in (torch.uint8, torch.int8)
    ]
    assert len(packed) == 18
    for name in packed:
        module = name.removesuffix("weight")
        parts = {key.removeprefix(module): one for key, one in tensors.items() if key.startswith(module)}
        weight = base[name].float()
        assert float((unpacked(parts) - weight).norm() / weight.norm()) < (0.12 if kind == "nf4" else 0.02)
    same = [name for name in base if name not in packed]
    assert all(torch.equal(base[name], tensors[name]) for name in same)
    assert (out / "tokenizer.json").is_file()
    assert not (out / "lowbit.json").exists()  # what was proven is not proven of this
    assert not (out / "README.md").exists()


def test_another_base_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path)
    other = write_tiny_model(tmp_path / "other", "qwen2")
    for target, says in (
        (BitsAndBytes(), "which is not on the hub; give --base MODEL"),
        (BitsAndBytes(base=str(other)), "is not the base that the checkpoint was made of"),
    ):
        with pytest.raises(CheckpointError, match=says):
            export(checkpoint, target, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "checkpoint", "other"]
