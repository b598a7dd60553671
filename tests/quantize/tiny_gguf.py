"""A tiny model as a GGUF file, so that unpacking can be tested without a download."""

import json
from pathlib import Path
from typing import Any

import gguf
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
}


def write_tiny_gguf(
    directory: Path,
    family: str = "llama",
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    left_out: str = "",
    yarn_factor: float | None = None,
) -> Path:
    """Write the tiny model and the same as `tiny.gguf` beside it, matrices as `kind`; returns the file.

    `left_out` is a tensor that the file lacks, `yarn_factor` what it says its positions are stretched by.
    """
    model = write_tiny_model(directory, family)
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(directory / "tiny.gguf", family)
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
    _add_tokenizer(writer, json.loads((model / "tokenizer.json").read_text()))
    tensors = load_file(model / "model.safetensors").items()
    for name, tensor in ((name, tensor) for name, tensor in tensors if _renamed(name) != left_out):
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        rows = next((count for leaf, count in heads.items() if family == "llama" and leaf in name), 0)
        values = _interleaved(tensor.float(), rows).numpy()
        raw = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(_renamed(name), gguf.quantize(values, raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return directory / "tiny.gguf"


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    special = {entry["content"] for entry in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)


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
