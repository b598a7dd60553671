"""What GGUF files call a family's sizes, and how llama.cpp wants its tensors.

A configuration is told key by key. What no key tells must be what the family's class has by itself, or the model is
refused: another would come out. Keys: the package gguf's `constants.py`, and the loaders of `src/models` in llama.cpp.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lowbit_core.errors import CheckpointError
from lowbit_quantize.model.sources.gguf_positions import HIGH, LOW

COMMON = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
EXPERTS = {
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
}
HEAD_SIZES = ("attention.key_length", "attention.value_length")
LOCAL_THETA = 10000.0
LINEAR = "linear"  # positions divided by a factor: as Gemma 3's above 1B
# What changes no number that a token's logits depend on, or is told by tensors that are there or not.
IGNORED = (
    "architectures", "auto_map", "bos_token_id", "cache_implementation", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "initializer_range", "is_encoder_decoder", "label2id", "model_type",
    "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type",
    "quantization_config", "return_dict", "tie_word_embeddings", "torch_dtype", "transformers_version",
    "use_cache", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "router_aux_loss_coef",
    "output_router_logits", "router_jitter_noise", "_name_or_path", "layer_types", "rope_parameters",
    "rope_theta", "rope_scaling", "head_dim", "partial_rotary_factor",
    "original_max_position_embeddings", "max_window_layers",
)  # fmt: skip


@dataclass(frozen=True)
class GgufFamily:
    """`architecture` is llama.cpp's name; `keys` are told besides the common ones, by names of the configuration.

    The rows of `rotated` tensors lie in pairs that turn together, where transformers has halves. `norm_offset` is what
    transformers adds to a norm's weight and files have added. `optional` are names whose tensors say themselves
    whether they are there; `fixed` gives those that llama.cpp takes to be so, whatever the class has by itself.
    `counted` are values of keys that take more than one name; `layers_told` says that the order of layers is in them.
    """

    architecture: str
    keys: Mapping[str, str] = field(default_factory=dict)
    rotated: tuple[str, ...] = ()
    norm_offset: float = 0.0
    optional: tuple[str, ...] = ()
    fixed: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    counted: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    layers_told: bool = False
    experts: bool = False
    stretched: bool = False  # whether a tensor can say how positions are stretched


def _gemma_scale(config: Any) -> int:
    """By whose root logits of attention are divided: the heads' size, but in the models of 27B."""
    of_27b = {"gemma2": 46, "gemma3_text": 62}[config.model_type] == config.num_hidden_layers
    return config.hidden_size // config.num_attention_heads if of_27b else head_size(config)


def _short_convolutions(config: Any) -> dict[str, Any]:
    """LFM2: layers without attention have no heads of keys; the width of the rest, rounded up where it is to be."""
    width = getattr(config, "block_ff_dim", None) or config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        width = int((config.block_ffn_dim_multiplier or 1.0) * int(2 * width / 3))
        width = config.block_multiple_of * -(-width // config.block_multiple_of)
    heads = config.num_key_value_heads
    kinds = config.layer_types
    return {
        "feed_forward_length": width,
        "attention.head_count_kv": [0 if kind == "conv" else heads for kind in kinds],
    }


LLAMA = GgufFamily(
    "llama",
    rotated=("attn_q", "attn_k"),
    optional=("attention_bias", "mlp_bias"),
    stretched=True,
)
FAMILIES = {
    "llama": LLAMA,
    "mistral": replace(LLAMA, fixed=lambda _: {"sliding_window": None}),
    "mixtral": replace(LLAMA, fixed=lambda _: {"sliding_window": None}, experts=True),
    "qwen2": GgufFamily("qwen2"),
    "qwen3": GgufFamily("qwen3"),
    "qwen2_moe": GgufFamily("qwen2moe", experts=True),
    "qwen3_moe": GgufFamily("qwen3moe", experts=True, fixed=lambda _: {"norm_topk_prob": True}),
    "lfm2": GgufFamily(
        "lfm2",
        {"attention.layer_norm_rms_epsilon": "norm_eps", "shortconv.l_cache": "conv_L_cache"},
        optional=(
            "conv_bias",
            "conv_dim",
            "conv_dim_out",
            "block_dim",
            "block_ff_dim",
            "block_auto_adjust_ff_dim",
            "block_ffn_dim_multiplier",
            "block_multiple_of",
            "full_attn_idxs",
        ),
        counted=_short_convolutions,
        layers_told=True,
    ),
    "phi3": GgufFamily(
        "phi3",
        {
            "attention.sliding_window": "sliding_window",  # which llama.cpp reads, and says that it sees everything
        },
    ),
    "gemma2": GgufFamily(
        "gemma2",
        {
            "attention.sliding_window": "sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        norm_offset=1.0,
        fixed=lambda config: {"query_pre_attn_scalar": _gemma_scale(config)},
    ),
    "gemma3_text": GgufFamily(
        "gemma3",
        {"attention.sliding_window": "sliding_window"},
        norm_offset=1.0,
        fixed=lambda config: {"query_pre_attn_scalar": _gemma_scale(config)},
    ),
}


def family_of(config: Any) -> GgufFamily:
    """Raises CheckpointError where a family is not in the table."""
    found = FAMILIES.get(config.model_type)
    if found is None:
        raise CheckpointError(
            f"models of type {config.model_type} are not written as GGUF; {', '.join(FAMILIES)} are"
        )
    return found


def sizes(family: GgufFamily, config: Any) -> dict[str, Any]:
    """Keys and values of a configuration, without the architecture before them.

    Raises CheckpointError where it says something that no key tells.
    """
    named: dict[str, tuple[str, ...]] = {key: (name,) for key, name in {**COMMON, **family.keys}.items()}
    if family.experts:
        named |= EXPERTS
    told = {
        key: (name, value) for key, names in named.items() for name, value in [_value(config, names)] if name
    }
    found = {key: value for key, (_, value) in told.items() if value is not None}
    found |= dict.fromkeys(HEAD_SIZES, head_size(config))
    found["rope.dimension_count"] = int(
        head_size(config) * (_positions(config).get("partial_rotary_factor") or 1.0)
    )
    found |= family.counted(config)
    found["rope.freq_base"] = float(_positions(config).get("rope_theta", 10000.0))
    if _stretch(config) == LINEAR:
        found |= {"rope.scaling.type": LINEAR, "rope.scaling.factor": float(_positions(config)["factor"])}
    _refuse_untold(family, config, dict(told.values()))
    return found


def _value(config: Any, names: tuple[str, ...]) -> tuple[str, Any]:
    name = next((name for name in names if hasattr(config, name)), "")
    return name, getattr(config, name) if name else None


def head_size(config: Any) -> int:
    """Channels of one head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _positions(config: Any) -> Mapping[str, Any]:
    """Of layers that see everything, where others see a window."""
    found = getattr(config, "rope_parameters", None) or {}
    return found.get("full_attention", found) if isinstance(found, Mapping) else {}


def _stretch(config: Any) -> str:
    return str(_positions(config).get("rope_type", "default"))


def stretching(family: GgufFamily, config: Any) -> Mapping[str, Any] | None:
    """Llama 3's parameters, which a tensor tells; None where it takes none; raises CheckpointError."""
    positions, kind = _positions(config), _stretch(config)
    if kind in ("default", LINEAR):
        _refuse_other_windows(config)
    usual = positions.get("low_freq_factor") == LOW and positions.get("high_freq_factor") == HIGH
    if kind == "llama3" and family.stretched and usual:
        return positions
    if kind not in ("default", LINEAR):
        raise CheckpointError(f"positions are stretched as {kind!r}, which is not written as GGUF")
    return None


def _refuse_other_windows(config: Any) -> None:
    """Positions of layers that see a window are as in every published model."""
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if local and (local.get("rope_type", "default"), local.get("rope_theta")) != ("default", LOCAL_THETA):
        raise CheckpointError(
            f"positions of its layers with a window are {dict(local)}, which a GGUF file cannot say "
            f"(it means a base of {LOCAL_THETA:.0f})"
        )


def _refuse_untold(family: GgufFamily, config: Any, told: Mapping[str, Any]) -> None:
    """What is not told must be what a class has by itself, given what is told; what it does not know is nothing."""
    plain = {**type(config)(**told).to_dict(), **family.fixed(config)}
    skipped = {*told, *IGNORED, *family.optional}
    for name, value in config.to_dict().items():
        if name in plain and name not in skipped and value != plain[name]:
            raise CheckpointError(
                f"its configuration has {name} = {value!r}, which a GGUF file of {family.architecture} cannot say "
                f"(it means {plain[name]!r})"
            )
    if not family.layers_told and _layers(config) != _layers(type(config)(**told)):
        raise CheckpointError("its layers see windows in another order than models of this type")


def _layers(config: Any) -> Any:
    return getattr(config, "layer_types", None)
