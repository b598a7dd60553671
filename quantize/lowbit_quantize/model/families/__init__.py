"""What engines do with a family, which running its layers cannot tell, and which families tests of ours run whole."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineFacts:
    """`renamed` are parts of names that are others in vLLM 0.32 without its own tables saying so, as (part, vLLM's): of
    a linear that is joined with another, or of a module. `kv_scales`: whether its attention layers have a place for
    scales of an FP8 cache; a checkpoint that holds some does not load where they have none
    (tests/contract/test_kv_scale_places.py).
    """

    renamed: tuple[tuple[str, str], ...] = ()
    kv_scales: bool = True


_GATE_UP = (("gate_proj", "gate_up_proj"),)
_PLAIN = EngineFacts()
FACTS = {  # by model type; tests run these whole
    "llama": _PLAIN,
    "mistral": _PLAIN,
    "qwen2": _PLAIN,
    "qwen3": _PLAIN,
    "phi3": _PLAIN,
    "gemma3_text": _PLAIN,
    "olmo2": _PLAIN,
    "olmoe": _PLAIN,
    "qwen3_moe": EngineFacts(renamed=_GATE_UP),
    "qwen2_moe": EngineFacts(renamed=_GATE_UP),
    "mixtral": _PLAIN,
    "deepseek_v2": EngineFacts(renamed=(("q_a_proj", "fused_qkv_a_proj"),)),
    "qwen3_5_text": _PLAIN,
    "qwen3_next": _PLAIN,
    "granitemoehybrid": EngineFacts(renamed=(("mamba", "mixer"),)),
    "glm4_moe": _PLAIN,
    "nemotron_h": _PLAIN,
    "lfm2": EngineFacts(kv_scales=False),
}
OTHERS = {  # that no test runs whole
    "lfm2_moe": EngineFacts(kv_scales=False),
    "jamba": EngineFacts(kv_scales=False),
    "zamba2": EngineFacts(kv_scales=False),
}
# Whose attention vLLM 0.32 gives heads of `head_dim` where the configuration says it; it divides the hidden size by the
# number of heads elsewhere (read in its models; Qwen 2 and OLMoE are of these).
_HEAD_DIM = frozenset(
    ("llama", "mistral", "mixtral", "phi3", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "granite", "glm4")
)
# Where `mlp_bias` and `attention_bias` give every linear a bias in transformers and in vLLM 0.32 alike (Qwen 3's
# attention has one of its last linear in transformers alone).
_BIASES = frozenset(("llama", "granite"))


def reads_biases(model_type: str) -> bool:
    """Whether engines take biases of networks and of attention where the configuration says that there are some."""
    return model_type in _BIASES


def reads_head_dim(model_type: str) -> bool:
    """Whether engines take a number of heads that do not fill the hidden size."""
    return model_type in _HEAD_DIM
