"""Families with routed experts, and with a latent in place of keys and values."""

from lowbit_quantize.model.architecture import LATENT, OUTPUT, Architecture, LinearGroup
from lowbit_quantize.model.families.dense import DENSE, GATED, attention, gated

_LATENT_ATTENTION = (
    LinearGroup(
        ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        "input_layernorm",
        "norm",
        attended=True,
    ),
    LinearGroup(("self_attn.q_b_proj",), "self_attn.q_a_layernorm", "norm", stage=LATENT),
    LinearGroup(("self_attn.kv_b_proj",), "self_attn.kv_a_layernorm", "norm", attended=True, stage=LATENT),
    LinearGroup(("self_attn.o_proj",), residual="input_layernorm", stage=OUTPUT),
)


def _experts(shared: str = "", gates: tuple[str, ...] = ()) -> tuple[LinearGroup, ...]:
    other_readers = ("mlp.gate", *gates)
    return gated("mlp.experts.*", other_readers=other_readers) + (
        gated(f"mlp.{shared}", other_readers=other_readers) if shared else ()
    )


_GATE_UP = (("gate_proj", "gate_up_proj"),)
FAMILIES = (
    Architecture("qwen3_moe", groups=DENSE + _experts(), moe_block="mlp", fused=_GATE_UP),
    Architecture(
        "qwen2_moe",
        groups=DENSE + _experts("shared_expert", ("mlp.shared_expert_gate",)),
        moe_block="mlp",
        fused=_GATE_UP,
    ),
    Architecture("olmoe", groups=attention() + _experts(), moe_block="mlp"),
    Architecture("mixtral", groups=attention() + _experts(), moe_block="mlp"),
    Architecture(
        "deepseek_v2",
        groups=_LATENT_ATTENTION + GATED + _experts("shared_experts"),
        moe_block="mlp",
        latent_cache=True,
        fused=(("q_a_proj", "fused_qkv_a_proj"),),
    ),
)
