"""Dense families: attention and one gated network, with separate or with fused linears."""

from lowbit_quantize.model.architecture import DOWN, NETWORK, OUTPUT, Architecture, LinearGroup


def attention(norm: str = "input_layernorm", residual: str = "input_layernorm") -> tuple[LinearGroup, ...]:
    reads = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return (
        LinearGroup(reads, norm, "norm" if norm else None, attended=True),
        LinearGroup(("self_attn.o_proj",), "self_attn.v_proj", "kv_rows", residual=residual, stage=OUTPUT),
    )


def gated(
    mlp: str, norm: str = "post_attention_layernorm", other_readers: tuple[str, ...] = (), residual: str = ""
) -> tuple[LinearGroup, ...]:
    return (
        LinearGroup(
            (f"{mlp}.gate_proj", f"{mlp}.up_proj"),
            norm,
            "norm" if norm else None,
            other_readers,
            stage=NETWORK,
        ),
        LinearGroup((f"{mlp}.down_proj",), f"{mlp}.up_proj", "rows", residual=residual, stage=DOWN),
    )


GATED = gated("mlp", residual="post_attention_layernorm")
DENSE = attention() + GATED
FUSED = (
    LinearGroup(("self_attn.qkv_proj",), "input_layernorm", "norm", attended=True),
    LinearGroup(
        ("self_attn.o_proj",), "self_attn.qkv_proj", "kv_rows", residual="input_layernorm", stage=OUTPUT
    ),
    LinearGroup(("mlp.gate_up_proj",), "post_attention_layernorm", "norm", stage=NETWORK),
    LinearGroup(
        ("mlp.down_proj",), "mlp.gate_up_proj", "rows", residual="post_attention_layernorm", stage=DOWN
    ),
)

FAMILIES = (
    *(Architecture(name, groups=DENSE) for name in ("llama", "mistral", "qwen2", "qwen3")),
    Architecture("phi3", groups=FUSED),
    Architecture(
        "gemma3_text",
        groups=attention(residual="") + gated("mlp", "pre_feedforward_layernorm"),
        middle="pre_feedforward_layernorm",
        norm_offset=1.0,
    ),
    Architecture("olmo2", groups=attention(norm="", residual="") + gated("mlp", norm=""), middle="mlp"),
)
