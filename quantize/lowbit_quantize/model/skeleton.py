"""The model without weights: parameters on the meta device, computed buffers real, experts as plain linears.

A model that reads pictures or sounds too is built whole, by its own class; its decoder is what is walked, on text.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.initialization import no_init_weights

from lowbit_core.errors import ModelError
from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.model.experts.linears import unstack_experts
from lowbit_quantize.model.hooks import register_attention

HALF = (torch.bfloat16, torch.float16)


def text_config(config: Any) -> Any:
    """The configuration of the decoder: the whole one, or its part where a model reads more than text."""
    return config.get_text_config(decoder=True)


def half_precision(config: Any, asked: str = "auto") -> torch.dtype:
    """What a model computes in: as asked, or as its configuration says; bfloat16 where that is no half precision."""
    named = (config.dtype or text_config(config).dtype) if asked == "auto" else getattr(torch, asked)
    return named if named in HALF else torch.bfloat16


def given(config: Any, name: str) -> Any:
    """A value of a configuration; None where there is none, or one for each layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # what transformers raises where layers differ
        return None


def change(data: dict[str, Any], changed: Mapping[str, Any], config: Any) -> None:
    """Set keys of the decoder's part of what was written of a configuration."""
    text = text_config(config)
    part = next((key for key in data if given(config, key) is text), None)
    if part is not None:
        data[part] = dict(data[part])
    place = data if part is None else data[part]
    for key, value in changed.items():
        stored = text.attribute_map.get(key, key)
        for other in (key, *(alias for alias, meant in text.attribute_map.items() if meant == stored)):
            place.pop(other, None)
        place[stored] = value


def is_wrapper(config: Any) -> bool:
    """Whether a model reads more than text."""
    return text_config(config) is not config


def model_class(config: Any) -> Any:
    """transformers' class for a configuration; raises ModelError where it has none that gives next tokens.

    Of a model of text alone transformers may know the class only in its table of those that read pictures (Mistral 4).
    """
    kinds = [MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING]
    for kind in reversed(kinds) if is_wrapper(config) else kinds:
        if type(config) in kind:
            return kind[type(config)]
    raise ModelError(f"transformers has no model for {type(config).__name__} that gives next tokens")


def build_skeleton(config: Any) -> nn.Module:
    """The model of a transformers configuration, in the half precision that it names, bfloat16 where it names none."""
    found = model_class(config)
    dtype = config.dtype if config.dtype in HALF else torch.bfloat16
    with init_empty_weights(include_buffers=False), no_init_weights():
        model: nn.Module = found._from_config(
            copy.deepcopy(config),
            dtype=dtype,
            attn_implementation=register_attention(eager=not found._supports_sdpa),
        )
        unstack_experts(model)
    model.tie_weights()  # type: ignore[operator]
    return model.eval()


def is_tied(skeleton: nn.Module, architecture: Architecture) -> bool:
    """Whether the embedding is the head."""
    return f"{architecture.head}.weight" in getattr(skeleton, "all_tied_weights_keys", {})


def text_modules(skeleton: nn.Module, architecture: Architecture) -> frozenset[str]:
    """Names of the modules that make up the decoder and its head; towers and projectors are none of them."""
    decoder = architecture.layers.rpartition(".")[0]
    names = {
        name
        for name, _ in skeleton.named_modules()
        if name in (decoder, architecture.head) or name.startswith((f"{decoder}.", f"{architecture.head}."))
    }
    whole = not is_wrapper(getattr(skeleton, "config"))  # noqa: B009 (nn.Module's getattr is typed as Module)
    return frozenset(names | ({""} if whole else set()))


def text_tensors(skeleton: nn.Module, architecture: Architecture) -> frozenset[str]:
    """Names of the tensors that the decoder and its head have."""
    modules = text_modules(skeleton, architecture)
    return frozenset(
        name for name in skeleton.state_dict() if "" in modules or name.rpartition(".")[0] in modules
    )
