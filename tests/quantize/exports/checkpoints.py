"""Tiny checkpoints to export, and the model that a checkpoint's own numbers make in float32."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from tests.quantize.small_runs import CPU, recipe_with
from tests.tiny_models import write_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from lowbit_quantize.catalog import CATALOG
from lowbit_quantize.export.checkpoint import Checkpoint
from lowbit_quantize.pipeline import quantize

FOUR: dict[str, Any] = {"scheme": "W4A16", "group_size": 64}
EIGHT: dict[str, Any] = {"scheme": "W8A16", "group_size": 32}
ASYMMETRIC: dict[str, Any] = {"scheme": "W4A16_ASYM", "group_size": 32}


def checkpoint_of(
    place: Path, family: str, *rules: dict[str, Any], sizes: dict[str, Any] | None = None, **sections: Any
) -> Path:
    """A tiny model of a family, rounded to nearest by rules that match everything unless they say otherwise."""
    base = write_tiny_model(place / "base", family, **(sizes or {}))
    recipe = recipe_with(*({"match": "*", **rule, "methods": ["rtn"]} for rule in rules), **sections)
    quantize(str(base), recipe, place / "checkpoint", CPU)
    return place / "checkpoint"


def float32_logits(directory: Path, ids: list[int]) -> Any:
    """(length, vocabulary) of the checkpoint's own numbers, computed in float32 by transformers."""
    checkpoint = Checkpoint(directory, CATALOG)
    weights: dict[str, torch.Tensor] = {}
    for shard in checkpoint.shards:
        for name, found in checkpoint.read(shard):
            if isinstance(found, torch.Tensor):
                weights |= {} if name.endswith(("k_scale", "v_scale")) else {name: found.float()}
            else:
                weights[f"{name}.weight"] = found.dequantize().float()
    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    with TemporaryDirectory() as plain:
        save_file(
            {name: weight.contiguous() for name, weight in weights.items()}, f"{plain}/model.safetensors"
        )
        config.save_pretrained(plain)
        model = AutoModelForCausalLM.from_pretrained(
            plain, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].numpy()
