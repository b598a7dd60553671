"""What a walk must know of a model: where the parts of its decoder layers are, and how scales fold.

A group is the linears that read the same activation and stand side by side, and the operation before it: dividing that
operation's output channels by `s` and multiplying the linears' input columns by `s` leaves the function unchanged. `*`
in a name stands for each routed expert. All of this is found by running a narrow twin (discovery/).
"""

from dataclasses import dataclass, replace

from torch import nn

from lowbit_quantize.model.logits import PLAIN, LogitsForm
from lowbit_quantize.model.spread import Spread
from lowbit_quantize.model.streams.form import PLAIN_STREAM, StreamForm


@dataclass(frozen=True)
class Fold:
    """The operation before a group: a norm, whose weight lies `offset` below what it multiplies by, or a linear.

    Its channels, to the power `power`, scale the group's columns as `spread` says.
    """

    producer: str
    spread: Spread
    norm: bool = False
    offset: float = 0.0
    power: int = 1


@dataclass(frozen=True)
class LinearGroup:
    """Linears of one decoder layer that share an input.

    `fold` is None where there is nothing that a scale could fold into. `other_readers` are modules that read the same
    activation and are not quantized. `attended` groups make keys or values: their errors reach other tokens through
    attention (attention.py). `residual` names the norm that reads the residual stream which the linear's output is
    added to, if it is added as it is (error_compensation.py). `stage` orders the groups: what a group reads depends on
    the groups of lower stages only. `cached`: the fold divides values that a cache keeps. `enters`: they read what all
    routed experts are called with.
    """

    linears: tuple[str, ...]
    fold: Fold | None = None
    other_readers: tuple[str, ...] = ()
    attended: bool = False
    residual: str = ""
    stage: int = 0
    cached: bool = False
    enters: bool = False

    def of_expert(self, number: int) -> "LinearGroup":
        """The group of one expert, if it is one of experts."""
        if "*" not in self.linears[0]:
            return self
        fold = self.fold and replace(self.fold, producer=self.fold.producer.replace("*", str(number)))
        return replace(
            self, linears=tuple(name.replace("*", str(number)) for name in self.linears), fold=fold
        )


@dataclass(frozen=True)
class LayerKind:
    """Decoder layers that are made alike; names are relative to the layer, and empty where it has no such part.

    `attention` computes attention and gives a tuple of `attention_outputs` (0: no tuple); `attention_end` is the linear
    that reads what attention gives. `middle` is the module that reads the residual stream between attention and the
    rest of the layer. `router` chooses among the `experts` of the `moe_block`; `entrance` reads what these are called
    with: the router, or the experts themselves where they are given something else. `outputs`: as `attention_outputs`,
    of the layer itself. `leaves` are linears whose outputs reach tensors that it leaves for later layers.
    `routes_alone`: whether the block routes by what it reads and nothing else. `dropped`: folds that were found and do
    not hold. `closing` is the linear whose output, added to what `middle` reads, is all that the layer gives.
    """

    groups: tuple[LinearGroup, ...]
    attention: str = ""
    attention_end: str = ""
    attention_outputs: int = 0
    middle: str = ""
    moe_block: str = ""
    experts: str = ""
    router: str = ""
    entrance: str = ""
    outputs: int = 0
    leaves: tuple[str, ...] = ()
    routes_alone: bool = True
    dropped: tuple[str, ...] = ()
    closing: str = ""

    def is_expert(self, group: LinearGroup) -> bool:
        """Whether the group belongs to a routed expert."""
        return bool(self.experts) and group.linears[0].startswith(f"{self.experts}.")


@dataclass(frozen=True)
class Architecture:
    """A model's own; names are relative to the model.

    `kinds` has an entry for each decoder layer, `stream` says what layers are called with. `final_norm_offset` is what
    the norm adds to its weight; rows of the embedding are multiplied by `embedding_factor`, and `logits` made of what
    the head gives. `latent_cache`: attention caches a normed latent and one rotary key (DeepSeek-AI 2024, arXiv
    2405.04434) instead of keys and values. `renamed` are parts of names that are others in vLLM 0.32 without its own
    tables saying so, as (part, vLLM's); `kv_scales`: whether it loads scales of an FP8 cache.
    `tested`: whether tests of ours run the family from end to end.
    """

    model_type: str
    kinds: tuple[LayerKind, ...]
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    final_norm_offset: float = 0.0
    embedding_factor: float = 1.0
    logits: LogitsForm = PLAIN
    stream: StreamForm = PLAIN_STREAM
    latent_cache: bool = False
    renamed: tuple[tuple[str, str], ...] = ()
    kv_scales: bool = True
    tested: bool = False

    @property
    def _routed(self) -> LayerKind | None:
        return next((kind for kind in self.kinds if kind.experts), None)

    @property
    def moe_block(self) -> str:
        """The name of the block with experts within the decoder layers that have one; empty for a dense model."""
        return self._routed.moe_block if self._routed else ""

    @property
    def experts(self) -> str:
        """The routed experts' name within a decoder layer that has them."""
        return self._routed.experts if self._routed else ""

    @property
    def router(self) -> str:
        """The router's name within a decoder layer that has one."""
        return self._routed.router if self._routed else ""

    def is_expert(self, group: LinearGroup) -> bool:
        """Whether the group belongs to a routed expert."""
        return self.in_experts(group.linears[0])

    def in_experts(self, name: str) -> bool:
        """Whether a linear is a routed expert's, by its name in the model or within a decoder layer."""
        return bool(self.moe_block) and f".{self.experts}." in f".{name}"

    def engine_names(self, name: str, published: str) -> tuple[str, ...]:
        """The names of a linear in quantization configurations: its published one, vLLM's where its own tables do not
        lead there, and transformers' own where that is another; routed experts have the published one only.
        """
        if self.in_experts(name):
            return (published,)
        parts, renamed = published.split("."), dict(self.renamed)
        engines = ".".join(renamed.get(part, part) for part in parts)
        return tuple(dict.fromkeys((published, engines, name)))

    def groups_of(self, layer: nn.Module) -> tuple[LinearGroup, ...]:
        """The groups that this decoder layer has, one for each expert where a name says `*`."""
        experts = len(layer.get_submodule(self.experts)) if self.has_experts(layer) else 0  # type: ignore[arg-type]
        return tuple(
            group.of_expert(number)
            for group in kind_of(layer).groups
            for number in range(experts if "*" in group.linears[0] else 1)
        )

    def has_experts(self, layer: nn.Module) -> bool:
        """Whether this decoder layer routes to experts."""
        return bool(kind_of(layer).experts)


def set_kind(layer: nn.Module, kind: LayerKind) -> None:
    """Note on a decoder layer how it is made; copies of it keep that."""
    layer.__dict__["lowbit_kind"] = kind


def kind_of(layer: nn.Module) -> LayerKind:
    """How a decoder layer of a skeleton is made."""
    kind: LayerKind = layer.__dict__["lowbit_kind"]
    return kind


def linear_of(layer: nn.Module, name: str) -> nn.Linear:
    """A linear of a decoder layer, by the name that its groups use."""
    module = layer.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}, its group says it is a linear")
    return module
