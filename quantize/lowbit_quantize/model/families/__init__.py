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
