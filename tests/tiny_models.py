"""Tiny seeded models of each family, with a real tokenizer trained on the bundled text."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    BloomConfig,
    DeepseekV2Config,
    DeepseekV4Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4MoeConfig,
    GraniteMoeHybridConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    NemotronHConfig,
    Olmo2Config,
    OlmoeConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from lowbit_quantize.model.skeleton import model_class
from lowbit_quantize.quality.sources import find_documents
from lowbit_quantize.recipe import Text

VOCABULARY = 512
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
ROUTED = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LATENT = {
    "kv_lora_rank": 512, "q_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64,
}  # fmt: skip
# Published models of this family all stretch their positions; vLLM 0.32's CPU kernel for plain ones is wrong (log.md).
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
    "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip
GROUPED = {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=32),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "phi3": Phi3Config(**SIZES, **SPECIAL),
    "gemma3_text": Gemma3TextConfig(
        **SIZES,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=32,
    ),
    "olmo2": Olmo2Config(**SIZES),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **ROUTED, mlp_only_layers=[0], norm_topk_prob=True),
    "qwen2_moe": Qwen2MoeConfig(
        **SIZES, **ROUTED, decoder_sparse_step=1, shared_expert_intermediate_size=128
    ),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2),
    "olmoe": OlmoeConfig(**SIZES, num_experts=8, num_experts_per_tok=2),
    "deepseek_v2": DeepseekV2Config(
        **(SIZES | {"num_key_value_heads": 4, "head_dim": 64}),
        **LATENT,
        **GROUPED,
        rope_parameters=YARN,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        n_shared_experts=1,
        first_k_dense_replace=1,
    ),
}
# What twelve families do not have: each of these has kinds of layers of its own.
FOUND: dict[str, Any] = {
    "qwen3_5_text": Qwen3_5TextConfig(  # gated delta nets between attention, an output gate in the latter
        **SIZES,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
    ),
    "qwen3_next": Qwen3NextConfig(  # the same, joined in other matrices; vLLM's file for it needs no torchvision
        **SIZES,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
        **ROUTED,
        shared_expert_intermediate_size=64,
        mlp_only_layers=[0, 1],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
    ),
    "granitemoehybrid": GraniteMoeHybridConfig(  # Mamba 2 between attention, multipliers everywhere
        **{key: value for key, value in SIZES.items() if key != "head_dim"},
        layer_types=["mamba", "attention", "mamba"],
        num_local_experts=0,
        shared_intermediate_size=192,
        mamba_n_heads=32,  # vLLM's CPU kernel for 4 bits wants the joint projection's rows in multiples of 32
        mamba_d_head=32,
        mamba_expand=8,
        mamba_d_state=32,
        mamba_chunk_size=32,
        embedding_multiplier=4.0,
        logits_scaling=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
        position_embedding_type="rope",
    ),
    "glm4_moe": Glm4MoeConfig(  # sigmoid routers with a correction bias, a dense first layer, a shared expert
        **SIZES,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        n_shared_experts=1,
        first_k_dense_replace=1,
        routed_scaling_factor=1.5,
        use_qk_norm=True,
        num_mtp_layers=0,
    ),
    "nemotron_h": NemotronHConfig(  # one mixer a layer, squared ReLU
        **{key: value for key, value in SIZES.items() if key != "num_hidden_layers"},
        layers_block_type=["mamba", "attention", "mlp", "mamba", "mlp"],
        ssm_state_size=32,
        mamba_num_heads=32,
        mamba_head_dim=32,
        n_groups=2,
        chunk_size=32,
    ),
    "lfm2": Lfm2Config(  # short convolutions between attention
        **{key: value for key, value in SIZES.items() if key != "head_dim"},
        layer_types=["conv", "full_attention", "conv"],
        block_auto_adjust_ff_dim=False,
        block_dim=128,  # the published files have these, vLLM asks for them
        conv_dim=128,
    ),
}
LATE_SHARED = {  # the last two layers read the keys and values of the last before them of their kind
    "num_hidden_layers": 5,
    "layer_types": [
        "sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"
    ],
    "num_kv_shared_layers": 2,
    "sliding_window": 32,
    "hidden_size_per_layer_input": 64,
    "vocab_size_per_layer_input": VOCABULARY,
}  # fmt: skip
# Layers that are called with more than one stream of hidden states: something of the tokens, copies, others' keys.
TOLD: dict[str, Any] = {
    "gemma3n_text": Gemma3nTextConfig(  # four copies, inputs of each layer for each token, low ranks beside attention
        **(SIZES | LATE_SHARED), laurel_rank=64, activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0, 0.0]
    ),
    "gemma4_text": Gemma4TextConfig(  # heads of two sizes
        **(SIZES | LATE_SHARED), global_head_dim=64
    ),
    "deepseek_v4": DeepseekV4Config(  # three copies, a router that looks its experts up by token
        **{key: value for key, value in SIZES.items() if key not in ("head_dim", "num_key_value_heads")},
        num_key_value_heads=1,
        head_dim=64,
        qk_rope_head_dim=32,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=32,
        index_n_heads=2,
        index_head_dim=32,
        index_topk=4,
        hc_mult=3,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        mlp_layer_types=["hash_moe", "moe", "moe"],
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        sliding_window=32,
    ),
    "bloom": BloomConfig(
        vocab_size=VOCABULARY, hidden_size=128, n_layer=3, n_head=4
    ),  # a norm behind the embedding
}
# Four sentences of 40 out of 32 tokens, so that what follows depends on more than the token before it.
SENTENCES = torch.randint(4, 36, (4, 40), generator=torch.Generator().manual_seed(7))
CONTEXT = 12  # tokens that a prompt gives
TREMBLE = 0.1  # of a router's weights, while it learns
LEARNED = 7.0  # logits between the right token and the next best, everywhere


def write_tiny_model(
    directory: Path, family: str = "llama", seed: int = 0, *, sentences: Tensor | None = None, **sizes: int
) -> Path:
    """Save a seeded model of `family` with uneven activations and weights, and its tokenizer.

    `sizes` replace configuration fields. A random model's choices are near ties, which rounding decides; one that
    was taught `sentences` (rows, tokens) says them by a clear margin.
    """
    config = copy.deepcopy((CONFIGS | FOUND | TOLD)[family])
    config.update(sizes)
    model = seeded_model(config, seed)
    if sentences is not None:
        model = taught(model.float(), sentences).to(torch.bfloat16)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def seeded_model(config: Any, seed: int = 0) -> Any:
    """A model in bfloat16 with uneven activations and weights."""
    torch.manual_seed(seed)
    model = model_class(config)._from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                offset = float(bool((parameter == 0).all()))  # what the family's norm adds
                parameter.copy_(torch.exp(0.5 * torch.randn_like(parameter)) - offset)
            elif parameter.dim() >= 2:
                parameter.mul_(4 * torch.exp(0.3 * torch.randn(1, parameter.shape[-1])).to(parameter.dtype))
            else:  # biases
                parameter.copy_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if buffer.dtype == torch.int64 and buffer.dim() == 2:  # a router's table of tokens
                experts = torch.rand(len(buffer), config.n_routed_experts).argsort(-1)
                buffer.copy_(experts[:, : buffer.shape[1]])
            if "correction_bias" in name:
                buffer.copy_(0.1 * torch.randn_like(buffer))
    return model


def taught(model: Any, sentences: Tensor) -> Any:
    """`model` after a few seconds of learning `sentences` by heart.

    Its routers do not learn, they tremble: the answer must not hang on a choice between experts that is a near tie.
    """
    routers = {name: p for name, p in model.named_parameters() if name.endswith(".gate.weight")}
    steady = {name: p.detach().clone() for name, p in routers.items()}
    learned = [p for name, p in model.named_parameters() if name not in routers]
    optimizer = torch.optim.Adam(learned, lr=2e-3, betas=(0.9, 0.95))
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=150 if routers else 100)
    for _ in range(200):
        for name, router in routers.items():
            router.data = steady[name] * (1 + TREMBLE * torch.randn_like(router))
        margin, loss = _lesson(model, sentences)
        if margin > LEARNED:
            break
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        slower.step()
    else:
        raise AssertionError(f"{type(model).__name__} did not learn its sentences")
    for name, router in routers.items():
        router.data = steady[name]
    return model


def _lesson(model: Any, sentences: Tensor) -> tuple[float, Tensor]:
    """The least margin of a right token after the prompt, and the loss."""
    logits, targets = model(sentences).logits[:, :-1], sentences[:, 1:]
    right = logits.gather(-1, targets.unsqueeze(-1))
    others = logits.scatter(-1, targets.unsqueeze(-1), -torch.inf).amax(-1, keepdim=True)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return float((right - others)[:, CONTEXT - 1 :].min()), loss


def tiny_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens."""
    fast = PreTrainedTokenizerFast(tokenizer_object=_trained(), eos_token="<|eos|>")
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


@cache
def _trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|eos|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    sample = [document.words for document in find_documents(Text(), "heldout", Text())[:40]]
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer
