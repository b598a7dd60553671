"""What differs between model families, as a table: where the parts of a decoder layer are and how scales fold.

A group is the linears that read the same activation, and the operation before it: dividing that operation's
output channels by `s` and multiplying the linears' input columns by `s` leaves the function unchanged. `*` in a
name stands for each routed expert. A group whose linears a layer does not have is not there: that is how dense
first layers, shared experts and the two shapes of latent attention are told apart.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

LATENT, OUTPUT, NETWORK, DOWN = 1, 2, 3, 4  # stages after 0: what reads a latent; o; gate and up; down


@dataclass(frozen=True)
class LinearGroup:
    """Linears of one decoder layer that share an input.

    `fold` says what `fold_into` is: a `norm` (its weight shrinks), a linear's last `rows`, or a value projection's
    last rows under grouped-query attention (`kv_rows`: each value channel feeds several query heads). None: there
    is nothing that a scale could fold into. `other_readers` are unquantized modules that read the same activation.
    `attended` groups make keys or values: their errors reach other tokens through attention (attention.py).
    `residual` names the norm that reads the residual stream which the linear's output is added to, if it is added as it
    is (targets.py). `stage` orders the groups: what a group reads depends on the groups of lower stages only.
    """

    linears: tuple[str, ...]
    fold_into: str = ""
    fold: Literal["norm", "rows", "kv_rows"] | None = None
    other_readers: tuple[str, ...] = ()
    attended: bool = False
    residual: str = ""
    stage: int = 0


@dataclass(frozen=True)
class Architecture:
    """One model family; names are relative to the model (`layers`, …) or to a decoder layer (groups).

    `middle` is the module that reads the residual stream between attention and the network; `norm_offset` is
    what a norm adds to its weight; `latent_cache`: attention caches a normed latent and one rotary key
    (DeepSeek-AI 2024, arXiv 2405.04434) instead of keys and values; `fused` are
    linears whose matrix vLLM 0.32 joins with another's without its own table saying so, as (linear, joint matrix).
    """

    model_type: str
    groups: tuple[LinearGroup, ...]
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    rotary: str = "model.rotary_emb"
    attention: str = "self_attn"
    middle: str = "post_attention_layernorm"
    moe_block: str = ""
    norm_offset: float = 0.0
    latent_cache: bool = False
    fused: tuple[tuple[str, str], ...] = ()

    @property
    def router(self) -> str:
        """The router's name within a decoder layer that has one; its input is every expert's."""
        return f"{self.moe_block}.gate"

    @property
    def attention_end(self) -> str:
        """The linear that reads what attention gives."""
        return f"{self.attention}.o_proj"

    @property
    def experts(self) -> str:
        """The routed experts' name within a decoder layer that has them."""
        return f"{self.moe_block}.experts"

    def is_expert(self, group: LinearGroup) -> bool:
        """Whether the group belongs to a routed expert."""
        return self.in_experts(group.linears[0])

    def in_experts(self, name: str) -> bool:
        """Whether a linear is a routed expert's, by its name in the model or within a decoder layer."""
        return bool(self.moe_block) and f".{self.experts}." in f".{name}"

    def engine_names(self, name: str, published: str) -> tuple[str, ...]:
        """The names of a linear in quantization configurations: its published one, that of the joint matrix that it
        begins where an engine's own table of these is not enough, and transformers' own where that is another; routed
        experts have the published one only.
        """
        if self.in_experts(name):
            return (published,)
        joint = [
            f"{published.removesuffix(one)}{other}" for one, other in self.fused if name.endswith(f".{one}")
        ]
        return (published, *joint, *([name] if name != published else []))

    def groups_of(self, layer: nn.Module) -> tuple[LinearGroup, ...]:
        """The groups that this decoder layer has, one for each expert where a name says `*`."""
        present = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        experts = len(layer.get_submodule(self.experts)) if self.has_experts(layer) else 0  # type: ignore[arg-type]
        found = []
        for group in self.groups:
            every = range(experts) if "*" in group.linears[0] else (0,)
            found += [_present(group, str(expert), present) for expert in every]
        return tuple(group for group in found if group.linears)

    def has_experts(self, layer: nn.Module) -> bool:
        """Whether this decoder layer routes to experts."""
        return bool(self.moe_block) and any(name == self.experts for name, _ in layer.named_modules())


def _present(group: LinearGroup, expert: str, present: set[str]) -> LinearGroup:
    linears = tuple(name.replace("*", expert) for name in group.linears)
    return LinearGroup(
        tuple(name for name in linears if name in present),
        group.fold_into.replace("*", expert),
        group.fold,
        group.other_readers,
        group.attended,
        group.residual,
        group.stage,
    )


def linear_of(layer: nn.Module, name: str) -> nn.Linear:
    """A linear of a decoder layer, by the name that the table uses."""
    module = layer.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}, the table says it is a linear")
    return module
