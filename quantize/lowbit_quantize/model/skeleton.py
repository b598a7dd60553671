"""The model without weights: parameters on the meta device, computed buffers real, experts as plain linears."""

from typing import Any

from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM

from lowbit_core.errors import ModelError
from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.model.experts import unstack_experts
from lowbit_quantize.model.hooks import register_attention
from lowbit_quantize.model.reference import ModelReference


def build_skeleton(config: Any, architecture: Architecture) -> nn.Module:
    """The model of a transformers configuration."""
    with init_empty_weights(include_buffers=False):
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, attn_implementation=register_attention(), trust_remote_code=False
        )
    layers: Any = model.get_submodule(architecture.layers)
    for layer in layers:
        if architecture.has_experts(layer):
            unstack_experts(layer, architecture.experts)
    return model.eval()


def skeleton_of(reference: ModelReference, architecture: Architecture) -> nn.Module:
    """The model of a reference; raises ModelError where its configuration makes none."""
    if getattr(reference.config, "final_logit_softcapping", None) is not None:
        raise ModelError(
            f"{reference.name} caps its logits (final_logit_softcapping), which is not supported"
        )
    try:
        return build_skeleton(reference.config, architecture)
    except Exception as error:  # whatever a wrong configuration makes of transformers' code
        raise ModelError(
            f"{reference.name}: no model can be built from its configuration: {error!r}"
        ) from error
