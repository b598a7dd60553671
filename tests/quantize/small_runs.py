"""Recipes for tiny models, and what plain transformers makes of a checkpoint."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit_quantize.quality.dataset import load_texts
from lowbit_quantize.recipe import Recipe, load_recipe, parse_recipe

SMALL = (
    "calibration.num_samples=16",
    "calibration.max_seq_length=64",
    "quality.num_samples=8",
    "quality.max_seq_length=64",
    "quality.isolate=false",
)
SMALL_FLAGS = tuple(part for override in SMALL for part in ("--set", override))
PLAIN_WEIGHTS = ("modules=[]", "passes=[]")
PLAIN_CACHE = "kv_cache.dtype=none"
PLAIN_EXPERTS = {"match": "*.experts.*", "scheme": "none"}
CPU = torch.device("cpu")


def recipe_of(name: str = "awq-g64", *overrides: str) -> Recipe:
    """A bundled recipe on little text."""
    return load_recipe(name, (*SMALL, *overrides))


def recipe_with(*rules: dict[str, Any], **sections: Any) -> Recipe:
    """A recipe of these rules on little text, without FP8 cache unless `sections` say so."""
    text = {"num_samples": 16, "max_seq_length": 64}
    data = {
        "modules": list(rules),
        "kv_cache": {"dtype": "none"},
        "calibration": text,
        "quality": text | {"num_samples": 8, "isolate": False},
    }
    return parse_recipe(data | sections, "of a test")


def pruning(**options: Any) -> str:
    """The override that prunes experts before weights are quantized."""
    return f"passes={json.dumps([{'prune_experts': options}, 'quantize'])}"


def heldout_ids(base: Path, recipe: Recipe) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(base)
    return load_texts(recipe.calibration, recipe.quality, tokenizer, 512)[1].ids


def calibration_ids(base: Path, recipe: Recipe) -> Tensor:
    """As many sequences as judge, by which the walk measures what it loses on its calibration text."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    return load_texts(recipe.calibration, recipe.quality, tokenizer, 512)[0].ids[: recipe.quality.num_samples]


def set_aside_ids(base: Path, recipe: Recipe) -> Tensor:
    """What of the calibration text only judges."""
    found = load_texts(recipe.calibration, recipe.quality, AutoTokenizer.from_pretrained(base), 512)[0].aside
    assert found is not None
    return found


def mean_kld(base: Any, other: Any, ids: Tensor) -> float:
    """Of two models of transformers, in nats."""
    with torch.inference_mode():
        p, q = (torch.log_softmax(model(ids).logits[:, :-1].double(), -1) for model in (base, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def reloaded_kld(base: Path, checkpoint: Path, recipe: Recipe, ids: Tensor | None = None) -> float:
    """Mean KL on `ids`, by default the recipe's held-out text, by plain transformers on both directories."""
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in (base, checkpoint)
    )
    return mean_kld(before, after, heldout_ids(base, recipe) if ids is None else ids)


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a directory."""
    return {
        name: tensor for path in checkpoint.glob("*.safetensors") for name, tensor in load_file(path).items()
    }


def stored_bytes(checkpoint: Path) -> int:
    """Bytes of all tensors in a directory's files, from their headers."""
    total = 0
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 (not a dict)
    return total
