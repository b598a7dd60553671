"""A layer or two of a published model's shape, made here of random weights and quantized: seconds by cause, memory.

The vocabulary is cut to 32,768 entries, so that making the model takes seconds; quality is that much faster.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu import seams
from benchmarks.gpu.place import Place, Spent
from benchmarks.gpu.report import Found
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

RECIPE = "gptq"
COMMON = {"vocab_size": 32768, "max_position_embeddings": 4096, "tie_word_embeddings": False}
TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a published model, `made` of its `layers` layers, and what that may take on a GPU."""

    name: str
    config: type[PreTrainedConfig]
    layers: int
    made: int
    seconds: float
    sizes: dict[str, Any]
    tiny: dict[str, Any] = field(default_factory=dict)


SHAPES = (
    Shape(
        "Llama-3.1-8B",
        LlamaConfig,
        layers=32,
        made=2,
        seconds=90,
        sizes={
            "hidden_size": 4096, "intermediate_size": 14336,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        },
        tiny={**TINY, "intermediate_size": 256},
    ),
    Shape(
        "Qwen3-30B-A3B",
        Qwen3MoeConfig,
        layers=48,
        made=1,
        seconds=120,
        sizes={
            "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
            "num_experts": 128, "num_experts_per_tok": 8,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        },
        tiny={
            **TINY, "intermediate_size": 256, "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2,
        },
    ),
)  # fmt: skip


def layer(shape: Shape) -> Callable[[Place], Found]:
    """The section of a shape."""

    def run(place: Place) -> Found:
        with tempfile.TemporaryDirectory() as temporary:
            model = Path(temporary) / "model"
            start_s = time.monotonic()
            _make(model, shape, place)
            making_s = time.monotonic() - start_s
            place.forget_peak()
            spent = Spent(place)
            settings = seams.SMALL if place.tiny else ()
            with seams.timed(seams.RUN_CAUSES, spent), spent.on("the rest of the run"):
                seams.quantize(model, RECIPE, Path(temporary) / "out", place.device, settings)
        return Found({**_by_layer(spent.seconds, shape), **place.peak(), "making_s": round(making_s, 1)})

    return run


def _make(directory: Path, shape: Shape, place: Place) -> None:
    """Random weights of this shape under published names, made on the device."""
    torch.manual_seed(0)
    config = shape.config(
        num_hidden_layers=shape.made, **(COMMON | (shape.tiny if place.tiny else shape.sizes))
    )
    with place.device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    seams.save_tiny_tokenizer(directory)


def _by_layer(seconds: dict[str, float], shape: Shape) -> dict[str, Any]:
    """Seconds of one layer by cause, what a run takes once, and the hours of all layers."""
    once = {cause: taken for cause, taken in seconds.items() if cause in seams.ONCE}
    each = {cause: taken / shape.made for cause, taken in seconds.items() if cause not in seams.ONCE}
    whole_s = shape.layers * sum(each.values()) + sum(once.values())
    return {
        "recipe": RECIPE,
        "layers_made": shape.made,
        "seconds_a_layer": {"all": round(sum(each.values()), 2)} | {c: round(s, 2) for c, s in each.items()},
        "seconds_once": {cause: round(taken, 2) for cause, taken in once.items()},
        f"hours_for_{shape.layers}_layers": round(whole_s / 3600, 3),
    }
