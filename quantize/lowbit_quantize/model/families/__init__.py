"""What engines do with a family, which running its layers cannot tell, and which families tests of ours run whole."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineFacts:
    """`fused` are linears whose matrix vLLM 0.32 joins with another's without its own table saying so, as (linear,
    joint matrix).
    """

    fused: tuple[tuple[str, str], ...] = ()


_GATE_UP = (("gate_proj", "gate_up_proj"),)
_PLAIN = EngineFacts()
FACTS = {  # by model type
    "llama": _PLAIN,
    "mistral": _PLAIN,
    "qwen2": _PLAIN,
    "qwen3": _PLAIN,
    "phi3": _PLAIN,
    "gemma3_text": _PLAIN,
    "olmo2": _PLAIN,
    "olmoe": _PLAIN,
    "qwen3_moe": EngineFacts(fused=_GATE_UP),
    "qwen2_moe": EngineFacts(fused=_GATE_UP),
    "mixtral": _PLAIN,
    "deepseek_v2": EngineFacts(fused=(("q_a_proj", "fused_qkv_a_proj"),)),
}
