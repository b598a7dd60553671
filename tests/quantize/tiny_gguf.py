"""A tiny model as a GGUF file, in one part or several, so that unpacking can be tested without a download."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from tests.tiny_models import write_tiny_model

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "lm_head": "output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate.": "ffn_gate_inp.",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
ARCHITECTURES = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens


def write_tiny_gguf(
    directory: Path,
    family: str = "llama",
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    left_out: str = "",
    yarn_factor: float | None = None,
    rope_freqs: Sequence[float] = (),
    tensors_a_part: int = 0,
    said: dict[str, Any] | None = None,
    **sizes: Any,
) -> Path:
    """Write the tiny model and the same as `tiny.gguf` beside it, matrices as `kind`; returns the file.

    `left_out` is a tensor that the file lacks, `yarn_factor` what it says its positions are stretched by,
    `rope_freqs` what its frequencies are divided by, `said` what it says of its tokenizer, or under full keys,
    besides. With `tensors_a_part` it is split, and its first part is returned.
    """
    model = write_tiny_model(directory, family, **sizes)
    config = json.loads((model / "config.json").read_text())
    architecture = ARCHITECTURES.get(family, family)
    writer = gguf.GGUFWriter(directory / "tiny.gguf", architecture, split_max_tensors=tensors_a_part)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if yarn_factor is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn_factor)
    tokenizer = _tokenizer(json.loads((model / "tokenizer.json").read_text()))
    _add_values(writer, {**tokenizer, **_expert_sizes(architecture, config), **(said or {})})
    tensors = _stacked(load_file(model / "model.safetensors").items())
    for name, tensor in ((name, tensor) for name, tensor in tensors if _renamed(name) != left_out):
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        rows = next((count for leaf, count in heads.items() if family == "llama" and leaf in name), 0)
        values = _interleaved(tensor.float(), rows).numpy()
        raw = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(_renamed(name), gguf.quantize(values, raw), raw_dtype=raw)
    if rope_freqs:
        writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
        writer.add_tensor("rope_freqs.weight", np.array(rope_freqs, np.float32))
    _write(writer)
    return sorted(directory.glob("tiny*.gguf"))[0]


def write_vocabulary(path: Path, said: dict[str, Any], architecture: str = "llama") -> Path:
    """A GGUF file of a tokenizer and nothing else, as llama.cpp's tests have them; `said` by keys without prefix."""
    writer = gguf.GGUFWriter(path, architecture)
    _add_values(writer, said)
    _write(writer)
    return path


def _expert_sizes(architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    """What a GGUF file says of its experts; nothing of a dense model."""
    if "moe_intermediate_size" not in config:
        return {}
    sizes = {
        "expert_count": config.get("num_experts") or config["num_local_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_feed_forward_length": config.get("shared_expert_intermediate_size"),
    }
    return {f"{architecture}.{key}": size for key, size in sizes.items()}


def _stacked(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Experts of a layer as one tensor, (experts, out, in), and the gate of a shared one as a vector."""

    def stack_of(item: tuple[str, torch.Tensor]) -> str:
        return re.sub(r"(?<=\.experts)\.\d+", "", item[0])

    def number_of(item: tuple[str, torch.Tensor]) -> int:
        found = re.search(r"\.experts\.(\d+)", item[0])
        return int(found[1]) if found else 0

    ordered = sorted(tensors, key=lambda item: (stack_of(item), number_of(item)))
    for name, entries in groupby(ordered, stack_of):
        values = [tensor for _, tensor in entries]
        stacked = torch.stack(values) if ".experts." in name else values[0]
        yield name, stacked.flatten() if "shared_expert_gate" in name else stacked


def _tokenizer(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """What a GGUF file says of the tiny tokenizer."""
    vocabulary = tokenizer["model"]["vocab"]
    special = {entry["content"] for entry in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.get)
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [CONTROL if token in special else NORMAL for token in tokens],
        "merges": [
            pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]
        ],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "padding_token_id": 0,
    }


def _add_values(writer: gguf.GGUFWriter, said: dict[str, Any]) -> None:
    """Values of None are left out."""
    for key, value in said.items():
        name = _full_name(key)
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, Sequence):
            writer.add_array(name, value)


def _full_name(key: str) -> str:
    if key.startswith(("general.", *ARCHITECTURES.values())):
        return key
    return f"tokenizer.{key}" if key.startswith("chat_template") else f"tokenizer.ggml.{key}"


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _renamed(name: str) -> str:
    name = name.replace("model.layers.", "blk.")
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries and keys in GGUF's order: the two halves of a head's rotary pairs alternate."""
    if not heads:
        return weight
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
