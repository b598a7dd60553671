"""What one step of a model computes, read off quantize's table: matrix products, routed experts, attention, the head.

Products are counted as engines make them: linears that read the same tensor are one matrix. Everything that is beside
products and attention (norms, activations, the engine itself) is nobody's here; profile.py measures it.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Union

from torch import nn

from lowbit_core.model_shape import ModelShape, shape_from_config
from lowbit_quantize.model.architecture import LinearGroup, kind_of, linear_of
from lowbit_quantize.model.experts.routing import USED
from lowbit_quantize.plan import Plan, decoder_layers
from lowbit_quantize.recipe import NONE
from lowbit_quantize.schemes.scheme import Scheme

Part = Union["Product", "RoutedExperts"]
# Tokens of a step of vLLM's server, on CPUs and on GPUs below 70 GB; a longer prompt takes several.
CHUNK = 2048


@dataclass(frozen=True)
class Product:
    """A matrix that tokens are multiplied by: its size, the scheme of its numbers and their bytes.

    `scheme` is None where weights are as they are.
    """

    inputs: int
    outputs: int
    scheme: Scheme | None
    bytes: int

    @property
    def name(self) -> str:
        """The name of its scheme and group size, as measurements are kept by: `none`, `W4A16:64`, `W8A8:channel`."""
        return scheme_name(self.scheme)

    def operations(self, tokens: float) -> float:
        """Multiplications and additions."""
        return 2.0 * self.inputs * self.outputs * tokens


@dataclass(frozen=True)
class RoutedExperts:
    """Experts of a layer, of which each token goes through `used`; `products` are one expert's."""

    count: int
    used: int
    products: tuple[Product, ...]

    def touched(self, tokens: int) -> float:
        """Experts that at least one of so many tokens goes to, where a router chooses evenly: e (1 - (1 - k/e)^n)."""
        return self.count * (1 - (1 - self.used / self.count) ** tokens)

    def bytes_read(self, tokens: int) -> float:
        """Of the experts that are touched."""
        return self.touched(tokens) * sum(one.bytes for one in self.products)

    def operations(self, tokens: int) -> float:
        """Of all tokens in their experts."""
        return sum(one.operations(tokens * self.used) for one in self.products)


@dataclass(frozen=True)
class Attention:
    """One layer's: query heads, heads of keys and values, channels of each, and whether its cache is in FP8."""

    heads: int
    kv_heads: int
    head_dim: int
    fp8: bool

    def cache_bytes(self, context: int) -> int:
        """Of the keys and values of so many tokens."""
        return 2 * self.kv_heads * self.head_dim * context * (1 if self.fp8 else 2)

    def operations(self, queries: int, context: int) -> float:
        """Of `queries` tokens that end a context: two products of heads x context x channels."""
        seen = queries * (context - (queries - 1) / 2)
        return 4.0 * self.heads * self.head_dim * seen


@dataclass(frozen=True)
class Work:
    """All that a step computes, each thing with the number of times that it stands in the model."""

    layers: int
    products: dict[Product, int]
    experts: dict[RoutedExperts, int]
    attention: dict[Attention, int]
    head: Product


def steps_of(queries: int) -> int:
    """Steps that an engine takes for a prompt of so many tokens."""
    return -(-queries // CHUNK)


def scheme_name(scheme: Scheme | None) -> str:
    return NONE if scheme is None else f"{scheme.name}:{scheme.group_size or 'channel'}"


def parts_of(plan: Plan) -> Iterator[tuple[list[str], Part]]:
    """Every matrix product and every layer's experts, with the names of their linears (of one expert) in the model."""
    for prefix, layer in decoder_layers(plan.skeleton, plan.architecture):
        routed: list[Product] = []
        names: list[str] = []
        for group in kind_of(layer).groups:
            one = group.of_expert(0)
            product = _product(plan, prefix, layer, one)
            if "*" in group.linears[0]:
                routed.append(product)
                names += [f"{prefix}.{name}" for name in one.linears]
            else:
                yield [f"{prefix}.{name}" for name in one.linears], product
        if routed:
            yield names, RoutedExperts(plan.experts or 1, experts_used(plan), tuple(routed))


def work_of(plan: Plan) -> Work:
    """The work of the model that a plan makes, on one device."""
    products: Counter[Product] = Counter()
    experts: Counter[RoutedExperts] = Counter()
    for _, part in parts_of(plan):
        if isinstance(part, Product):
            products[part] += 1
        else:
            experts[part] += 1
    depth = len(plan.architecture.kinds)
    return Work(depth, dict(products), dict(experts), _attention(plan), _head(plan))


def experts_used(plan: Plan) -> int:
    """Experts that each token goes through."""
    found = [getattr(plan.config, name, None) for name in USED]
    return int(next((count for count in found if count), 1))


def _product(plan: Plan, prefix: str, layer: nn.Module, group: LinearGroup) -> Product:
    linears = [linear_of(layer, name) for name in group.linears]
    entry = plan.modules.get(f"{prefix}.{group.linears[0]}")
    scheme = entry.scheme if entry and entry.compressed else None
    inputs, outputs = linears[0].in_features, sum(one.out_features for one in linears)
    size = (
        sum(scheme.bytes(one.out_features, inputs)[0] for one in linears)
        if scheme
        else inputs * outputs * plan.dtype.itemsize
    )
    return Product(inputs, outputs, scheme, size)


def _head(plan: Plan) -> Product:
    inputs, outputs = int(plan.config.hidden_size), int(plan.config.vocab_size)
    entry = plan.modules.get(plan.architecture.head)
    if entry is None or not entry.compressed:
        return Product(inputs, outputs, None, inputs * outputs * plan.dtype.itemsize)
    return Product(inputs, outputs, entry.scheme, entry.scheme.bytes(outputs, inputs)[0])


def _attention(plan: Plan) -> dict[Attention, int]:
    """Layers that cache nothing attend to nothing; a latent counts as one head of keys that is read once."""
    shape = shape_of(plan)
    caching = [number for number, kind in enumerate(plan.architecture.kinds) if kind.attention]
    if shape.latent_dim:
        one = Attention(plan.config.num_attention_heads, 1, shape.latent_dim // 2, fp8=False)
        return {one: len(caching)}
    heads = int(plan.config.num_attention_heads)
    found = Counter(
        Attention(heads, shape.kv_heads, shape.head_dim, number in plan.fp8_layers) for number in caching
    )
    return dict(found)


def shape_of(plan: Plan) -> ModelShape:
    """What its cache is made of."""
    return shape_from_config(plan.config.to_dict())
