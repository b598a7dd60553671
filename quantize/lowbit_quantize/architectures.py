"""What differs between model families, as a table: where the parts of a decoder layer are and how scales fold.

A group is the linears that read the same activation, and the operation before it: dividing that operation's
output channels by `s` and multiplying the linears' input columns by `s` leaves the function unchanged.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from lowbit_core.errors import ModelError


@dataclass(frozen=True)
class LinearGroup:
    """Linears of one decoder layer that share an input.

    `fold` says what `fold_into` is: a `norm` (its weight shrinks), a linear's `rows`, or a value projection's
    rows under grouped-query attention (`kv_rows`: each value channel feeds several query heads).
    """

    linears: tuple[str, ...]
    fold_into: str
    fold: Literal["norm", "rows", "kv_rows"]


@dataclass(frozen=True)
class Architecture:
    """One model family; names are relative to the model (`layers`, …) or to a decoder layer (groups)."""

    model_type: str
    groups: tuple[LinearGroup, ...]
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    rotary: str = "model.rotary_emb"
    attention: str = "self_attn"


_GATED_DECODER = (
    LinearGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "norm"),
    LinearGroup(("self_attn.o_proj",), "self_attn.v_proj", "kv_rows"),
    LinearGroup(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "norm"),
    LinearGroup(("mlp.down_proj",), "mlp.up_proj", "rows"),
)

ARCHITECTURES = {
    name: Architecture(name, groups=_GATED_DECODER) for name in ("llama", "mistral", "qwen2", "qwen3")
}


def architecture_of(model_type: str, model: str) -> Architecture:
    """The table's entry; raises ModelError naming what is known."""
    if model_type not in ARCHITECTURES:
        raise ModelError(
            f"{model} has the architecture {model_type!r}; supported are: {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[model_type]


def linear_of(layer: nn.Module, name: str) -> nn.Linear:
    """A linear of a decoder layer, by the name that the table uses."""
    module = layer.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}, the table says it is a linear")
    return module
