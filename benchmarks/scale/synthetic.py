"""A checkpoint of any size: a real architecture and tokenizer, random weights, one shard a layer.

    python benchmarks/scale/synthetic.py DIR --layers 44

Widths are Llama-3.2-1B's by default, its head not tied. Only one layer is in memory while it is written.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.tiny_models import tiny_tokenizer

STD = 0.02
INDEX = "model.safetensors.index.json"


def write_synthetic(
    directory: Path,
    layers: int,
    hidden: int = 2048,
    intermediate: int = 8192,
    vocabulary: int = 128_256,
    seed: int = 0,
) -> int:
    """Write the checkpoint, if it is not there, and return the bytes of its weights."""
    directory.mkdir(parents=True, exist_ok=True)
    heads = hidden // 64
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(_shards(config)):
        file = f"model-{number:05d}.safetensors"
        if not (directory / file).is_file():
            generator = torch.Generator().manual_seed(1_000_003 * seed + number)
            save_file(_tensors(shapes, generator), directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shapes, file))
        total += (directory / file).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))
    return total


def _tensors(shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if "norm" in name
        else torch.empty(shape, dtype=torch.bfloat16).normal_(std=STD, generator=generator)
        for name, shape in shapes.items()
    }


def _shards(config: LlamaConfig) -> list[dict[str, tuple[int, ...]]]:
    """The shapes in each shard: embedding, every layer, norm and head."""
    hidden, middle = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * (hidden // config.num_attention_heads)
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (middle, hidden),
        "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    return [
        {"model.embed_tokens.weight": (config.vocab_size, hidden)},
        *(
            {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
            for index in range(config.num_hidden_layers)
        ),
        {"model.norm.weight": (hidden,), "lm_head.weight": (config.vocab_size, hidden)},
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=44)
    arguments = parser.parse_args()
    print(write_synthetic(arguments.directory, arguments.layers), "bytes")
