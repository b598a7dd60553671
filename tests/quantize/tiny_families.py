"""Tiny seeded models of many families as transformers itself saves them, and where the parts of each are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.model.skeleton import model_class

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
ROUTED: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 48, "n_shared_experts": 1, "shared_expert_intermediate_size": 48,
    "first_k_dense_replace": 1,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "q_lora_rank": 32, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
GATED_DELTA: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_num_heads": 4,
    "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1, "mamba_expand": 2, "expand": 2,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "head_dim": 16,
    "deepstack_visual_indexes": [0],
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Keys of the configuration (of the text part where there is a tower), and names of modules."""

    config: Mapping[str, Any] = field(default_factory=dict)
    final_norm: str = "norm"
    embedding: str = "embed_tokens"
    text: str = ""  # the text part's type where it could be several
    wrapper: bool = False

    def architecture(self, model_type: str) -> Architecture:
        """Names alone: what is found of layers is not asked for here."""
        decoder = "model.language_model" if self.wrapper else "model"
        return Architecture(
            model_type,
            kinds=(),
            layers=f"{decoder}.layers",
            embedding=f"{decoder}.{self.embedding}",
            final_norm=f"{decoder}.{self.final_norm}",
        )


FAMILIES: dict[str, Family] = {
    "llama": Family({"tie_word_embeddings": True}),
    "mixtral": Family(ROUTED),
    "qwen3_moe": Family(ROUTED),
    "deepseek_v3": Family(ROUTED | LATENT),
    "deepseek_v32": Family(ROUTED | LATENT | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 64}),
    "mistral4": Family(ROUTED | LATENT),
    "glm4_moe": Family(ROUTED),
    "minimax_m2": Family(ROUTED),
    "gpt_oss": Family(ROUTED),
    "granitemoehybrid": Family(
        ROUTED | MAMBA | {"shared_intermediate_size": 48, "layer_types": ["mamba", "attention", "mamba"]}
    ),
    "qwen3_next": Family(ROUTED | GATED_DELTA),
    "lfm2": Family(
        {"block_ff_dim": 96, "layer_types": ["conv", "full_attention", "conv"]}, final_norm="embedding_norm"
    ),
    "nemotron_h": Family(
        ROUTED | MAMBA
        | {"layers_block_type": ["mamba", "attention", "mlp", "moe"], "num_hidden_layers": 4,
           "moe_shared_expert_intermediate_size": 48},
        final_norm="norm_f",
        embedding="embeddings",
    ),
    "kimi_linear": Family(
        ROUTED | LATENT | GATED_DELTA
        | {"num_expert_group": 1, "num_experts_per_token": 2, "linear_num_heads": 4, "linear_head_dim": 16}
    ),
    "deepseek_v4": Family(
        ROUTED | LATENT
        | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 64, "o_groups": 2, "o_lora_rank": 16, "hc_mult": 2}
    ),
    "lfm2_moe": Family(
        ROUTED | {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
        final_norm="embedding_norm",
    ),
    "ernie4_5_moe": Family(
        {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": 48,
         "moe_layer_start_index": 1}
    ),
    "phimoe": Family(ROUTED),
    "mistral3": Family(text="mistral", wrapper=True),
    "gemma3": Family({"sliding_window": 16, "tie_word_embeddings": True}, wrapper=True),
    "qwen3_5_moe": Family(ROUTED | GATED_DELTA, wrapper=True),
    "qwen3_vl_moe": Family(ROUTED, wrapper=True),
}  # fmt: skip


def config_of(model_type: str) -> Any:
    """The tiny configuration of a family."""
    family, base = FAMILIES[model_type], AutoConfig.for_model(model_type)
    if not family.wrapper:
        return _sized(base, {**SIZES, **family.config})
    text = AutoConfig.for_model(family.text) if family.text else base.text_config
    return type(base)(
        text_config=_sized(text, {**SIZES, **family.config}),
        vision_config=_sized(base.vision_config, TOWER),
        tie_word_embeddings=bool(family.config.get("tie_word_embeddings", False)),
    )


def _sized(config: Any, sizes: Mapping[str, Any]) -> Any:
    known = set(config.to_dict()) | set(vars(config)) | set(config.attribute_map)
    return type(config)(**{key: value for key, value in sizes.items() if key in known})


def tiny_family(model_type: str, seed: int = 0) -> Any:
    """A random model in float32, with uneven weights."""
    torch.manual_seed(seed)
    config = config_of(model_type)
    found = model_class(config)
    attention = "sdpa" if found._supports_sdpa else "eager"
    model: nn.Module = found._from_config(config, dtype=torch.float32, attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                size = 0.3 if tensor.dim() == 1 or "norm" in name else 1.5 / tensor.shape[-1] ** 0.5
                start = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                tensor.copy_(start + size * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def saved_family(directory: Path, model_type: str, dtype: torch.dtype = torch.float32) -> Any:
    """Save a tiny model as transformers does, which is how its family is published; returns the model."""
    model = tiny_family(model_type).to(dtype)
    model.save_pretrained(directory)
    return model
