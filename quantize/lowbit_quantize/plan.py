"""A recipe's rules become one table for a model: every linear that is quantized, with its scheme and methods.

Everything that can be refused before the first expensive second is refused here, from configuration and headers
alone. The walk, the forecast, sharding, the configuration of the checkpoint and the manifest read nothing of the
rules but this table.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from lowbit_core.errors import RecipeError
from lowbit_core.log import get_logger
from lowbit_quantize import misfits
from lowbit_quantize.cache_layers import layers_in_fp8, without_unread_scales
from lowbit_quantize.catalog import CATALOG, Catalog
from lowbit_quantize.model.architecture import Architecture, linear_of
from lowbit_quantize.model.experts.routing import COUNTS
from lowbit_quantize.model.files.kept_types import KeptTypes
from lowbit_quantize.model.files.published_floats import PublishedFloats
from lowbit_quantize.model.files.published_names import PublishedNames
from lowbit_quantize.model.reference import ModelReference
from lowbit_quantize.model.resized import OpenModel
from lowbit_quantize.model.skeleton import half_precision, is_tied, text_config
from lowbit_quantize.opening import Cut, cut_by, floats_of, open_base
from lowbit_quantize.pass_list import make_passes
from lowbit_quantize.passes.drop_layers import DropLayers
from lowbit_quantize.recipe import QUANTIZE, Recipe
from lowbit_quantize.rules import Wanted, resolve
from lowbit_quantize.schemes.scheme import Scheme
from lowbit_quantize.schemes.storage.stored_linears import reader_of
from lowbit_quantize.walk.baselines import baseline_sequences
from lowbit_quantize.walk.layer import Pass
from lowbit_quantize.walk.module_plan import ModulePlan, Modules

log = get_logger("quantize")

EMBEDDING_STAYS = (
    "engines look rows up in: vLLM 0.32 reads quantized rows on GPUs only, and none of a matrix that is the "
    "head too"
)
GATES_STAY = "a router or a gate: few weights, on which much hangs"


@dataclass(frozen=True)
class Plan:
    """A model and a recipe that fit each other; `modules` has every quantized linear by its name in the skeleton."""

    reference: ModelReference
    recipe: Recipe
    architecture: Architecture
    skeleton: nn.Module
    modules: Modules
    passes: tuple[Pass, ...]
    floats: PublishedFloats | None = None  # what the base is published in, if not in ordinary floats
    left_because: Mapping[str, str] = field(default_factory=dict)  # why others have no entry in `modules`
    cut: Cut | None = None  # where passes make another model of the base

    @property
    def served(self) -> OpenModel:
        """The model of the checkpoint; tensors that passes of another kind take out of it are still there (`shape`)."""
        config = self.cut.config if self.cut else self.reference.config
        return OpenModel(config, self.architecture, self.skeleton)

    @property
    def base(self) -> OpenModel:
        """The model as it was published."""
        return self.cut.base if self.cut else self.served

    @property
    def walked(self) -> OpenModel:
        """The model whose layers walk: as deep as the served one, as wide as the base."""
        return self.cut.walked if self.cut else self.served

    @property
    def dropping(self) -> DropLayers | None:
        """The pass that drops layers; it may still be to be measured which ones."""
        return next((one for one in self.passes if isinstance(one, DropLayers)), None)

    @property
    def tied(self) -> bool:
        """Whether the embedding is the head."""
        return is_tied(self.skeleton, self.architecture)

    @property
    def config(self) -> Any:
        """The configuration of the decoder, in the checkpoint."""
        return text_config(self.served.config)

    @cached_property
    def names(self) -> PublishedNames:
        """What the model's tensors are called in files."""
        return PublishedNames(self.skeleton)

    @cached_property
    def kept_types(self) -> KeptTypes:
        """Which tensors do not have `dtype`."""
        return KeptTypes(self.skeleton, self.names)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in, and what is not quantized is stored in."""
        return half_precision(self.served.config, self.recipe.base.dtype)

    @property
    def paired(self) -> bool:
        """Whether the base model's calibration tokens walk too, so that weights can make up for earlier errors."""
        return self.compensates or any(one.needs_base_stream for one in self.passes)

    @property
    def compensates(self) -> bool:
        """Whether methods do, for what passes before them have taken out as well."""
        entries = (entry for name, entry in self.modules.items() if name != self.architecture.head)
        return any(entry.compensates for entry in entries)

    @property
    def quantizes_head(self) -> bool:
        """Whether the output matrix is quantized, which only a rule that names it asks for."""
        return self.architecture.head in self.modules

    @cached_property
    def fp8_layers(self) -> frozenset[int]:
        """Numbers of the layers that keep keys and values in FP8."""
        return layers_in_fp8(self.recipe.kv_cache, self.architecture, self.config)

    @property
    def fp8_cache(self) -> bool:
        return bool(self.fp8_layers)

    @property
    def scales_by_head(self) -> bool:
        """Whether each head's keys and values have scales of their own."""
        return self.fp8_cache and self.recipe.kv_cache.strategy == "attn_head"

    @property
    def configuration(self) -> dict[str, Any]:
        """Keys of the model's configuration that passes change."""
        return {key: value for one in self.passes for key, value in one.configuration().items()}

    @property
    def experts(self) -> int | None:
        """Routed experts of each layer of the checkpoint; None for a dense model."""
        if not self.architecture.moe_block:
            return None
        return int(
            next((self.configuration[key] for key in COUNTS if key in self.configuration), self.base_experts)
        )

    @property
    def base_experts(self) -> int:
        """Routed experts of each layer of the base."""
        routed = (
            layer.get_submodule(self.architecture.experts)
            for _, layer in decoder_layers(self.skeleton, self.architecture)
            if self.architecture.has_experts(layer)
        )
        return max((len(experts) for experts in routed), default=0)  # type: ignore[arg-type]

    @cached_property
    def parameters(self) -> int:
        """Parameters of the base model; tied ones count once."""
        tied = f"{self.architecture.head}.weight" if self.tied else ""
        return sum(p.numel() for name, p in self.base.skeleton.named_parameters() if name != tied)

    @cached_property
    def unopened(self) -> dict[str, tuple[Scheme, str]]:
        """Published names of the linears that plain transformers does not open: their scheme, and who opens them."""
        linears = decoder_linears(self.skeleton, self.architecture)
        if self.quantizes_head:
            linears[self.architecture.head] = linear_of(self.skeleton, self.architecture.head)
        readers = {
            name: reader_of(
                entry.scheme, linears[name].weight.shape, expert=self.architecture.in_experts(name)
            )
            for name, entry in self.modules.items()
            if self.stays(name)
        }
        return {
            self.names.published(name): (self.modules[name].scheme, reader)
            for name, reader in readers.items()
            if reader is not None
        }

    @cached_property
    def unquantized_linears(self) -> tuple[str, ...]:
        """Published names of the decoder's linears that stay as they are."""
        published = self.names.published
        names = decoder_linears(self.skeleton, self.architecture)
        return tuple(published(name) for name in names if name not in self.modules and self.stays(name))

    @cached_property
    def plain(self) -> tuple[str, ...]:
        """Published names of the linears with an entry that are stored as the base stores its own, pruned alone."""
        names = (name for name, one in self.modules.items() if not one.compressed and self.stays(name))
        return tuple(map(self.names.published, names))

    @cached_property
    def unquantized(self) -> tuple[str, ...]:
        """Published names of all that keeps its numbers: the head, routers and gates as well."""
        published = self.names.published
        gates = dict.fromkeys(
            published(f"{prefix}.{name}")
            for prefix, layer in decoder_layers(self.skeleton, self.architecture)
            for group in self.architecture.groups_of(layer)
            for name in group.other_readers
        )
        head = () if self.quantizes_head else (published(self.architecture.head),)
        return (*head, *gates, *self.unquantized_linears)

    @cached_property
    def unquantized_because(self) -> dict[str, str]:
        """Why each of `unquantized` stays as it is."""
        known = {self.names.published(name): reason for name, reason in self.left_because.items()}
        return {name: known.get(name, GATES_STAY) for name in self.unquantized}

    def baselines(self, domains: Sequence[str]) -> dict[str, list[int]]:
        """The held-out sequences, of these domains, that walk as baselines; none where the recipe wants none."""
        return baseline_sequences(domains, fp8_cache=self.fp8_cache) if self.recipe.quality.isolate else {}

    def stays(self, name: str) -> bool:
        """Whether a linear is still there after all passes."""
        return self.shape(f"{name}.weight", (1, 1)) is not None

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """A tensor's shape after all passes; None if it is gone."""
        found: tuple[int, ...] | None = shape
        for one in self.passes:
            found = None if found is None else one.shape(name, found)
        return found


def make_plan(
    reference: ModelReference, recipe: Recipe, catalog: Catalog = CATALOG, kept: Sequence[int] | None = None
) -> Plan:
    """Check that the recipe fits the model; raises ModelError or RecipeError.

    `kept` are the numbers of the base's layers that stay, where that was measured for a pass.
    """
    floats = floats_of(reference)
    base = open_base(reference, say=kept is None)
    passes = make_passes(recipe.passes, reference, base.architecture, catalog)
    served, passes, cut = cut_by(passes, base, recipe, kept)
    architecture, skeleton = served.architecture, served.skeleton
    recipe = without_unread_scales(recipe, architecture)
    misfits.check_positions(reference.name, reference.config, recipe)
    dtype = half_precision(served.config, recipe.base.dtype)
    modules, left_because = table_of(skeleton, architecture, recipe, catalog, dtype)
    if modules and not any(one.name == QUANTIZE for one in passes):
        raise RecipeError(
            f"modules quantize {len(modules)} linears and passes lacks {QUANTIZE}; add it to passes"
        )
    if not modules and any(one.name == QUANTIZE for one in passes):
        raise RecipeError(
            f"modules leave no linear to quantize; give a rule with a scheme, or leave {QUANTIZE} out of passes"
        )
    for one in passes:
        one.check(modules)
    layers_in_fp8(recipe.kv_cache, architecture, text_config(served.config))
    return Plan(reference, recipe, architecture, skeleton, modules, passes, floats, left_because, cut)


def decoder_layers(skeleton: nn.Module, architecture: Architecture) -> Iterator[tuple[str, nn.Module]]:
    """Decoder layers with their names."""
    layers: Any = skeleton.get_submodule(architecture.layers)
    for index, layer in enumerate(layers):
        yield f"{architecture.layers}.{index}", layer


def decoder_linears(skeleton: nn.Module, architecture: Architecture) -> dict[str, nn.Linear]:
    """Every linear of the decoder's groups, by its name in the skeleton."""
    return {
        f"{prefix}.{name}": linear_of(layer, name)
        for prefix, layer in decoder_layers(skeleton, architecture)
        for group in architecture.groups_of(layer)
        for name in group.linears
    }


def table_of(
    skeleton: nn.Module, architecture: Architecture, recipe: Recipe, catalog: Catalog, dtype: torch.dtype
) -> tuple[Modules, dict[str, str]]:
    """The entry of each linear that a rule changes, in the order of the layers, and why the others have none.

    `dtype` is what is not quantized is stored in. Raises RecipeError.
    """
    linears = decoder_linears(skeleton, architecture)
    others = [name for name, module in skeleton.named_modules() if _has_matrix(module)]
    names = PublishedNames(skeleton)
    published = {name: names.published(name) for name in dict.fromkeys([*linears, *others])}
    head, fixed = _outside(skeleton, architecture)
    wanted = resolve(recipe.modules, published, linears.keys(), catalog, head.keys(), fixed, dtype)
    sets = list(fused_sets(skeleton, architecture))
    modules: dict[str, ModulePlan] = {}
    for one in sets:
        entry = _shared_entry(one, wanted, published)
        modules.update(dict.fromkeys(one, entry) if entry else {})
    modules = {name: modules[name] for name in linears if name in modules}
    compressed = {name: entry for name, entry in modules.items() if entry.compressed}
    misfits.check_experts(compressed, linears, architecture, published)
    misfits.check_opened(compressed, names, skeleton)
    modules |= {name: entry for name in head if (entry := wanted[name].entry)}
    fixed_sizes = {preset.name for preset in catalog.presets if preset.fixed_size}
    for name, entry in modules.items():
        has_no_other = entry.scheme.name in fixed_sizes
        misfits.check_width(
            published[name],
            (linears | head)[name].in_features,
            entry,
            linears.values(),
            fixed_size=has_no_other,
        )
    for one in _one_matrix(skeleton, architecture):
        if one[0] in modules:
            outputs = [linears[name].out_features for name in one]
            misfits.check_outputs([published[name] for name in one], outputs, modules[one[0]])
    for name, linear in head.items():
        misfits.check_words(name, linear.out_features, modules.get(name))
    because = _because(sets, wanted, published) | fixed
    return modules, {name: reason for name, reason in because.items() if name not in modules}


def _because(
    sets: Sequence[list[str]], wanted: Mapping[str, Wanted], published: Mapping[str, str]
) -> dict[str, str]:
    """Why a linear has no entry in the table, if it has none."""
    reasons = {name: one.left_because for name, one in wanted.items()}
    for names in sets:
        plain = next((name for name in names if wanted[name].entry is None), None)
        if plain is not None:
            fused = f"engines fuse it with {published[plain]}, which stays as it is"
            reasons.update((name, fused) for name in names if wanted[name].entry is not None)
    return reasons


def _outside(skeleton: nn.Module, architecture: Architecture) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """What rules may ask for beside the decoder's linears, the head; and by name why the embedding stays as it is."""
    head, embedding = architecture.head, architecture.embedding
    fixed = {embedding: EMBEDDING_STAYS}
    if is_tied(skeleton, architecture):
        return {}, fixed | {head: f"is {embedding}, which {EMBEDDING_STAYS}"}
    return {head: linear_of(skeleton, head)}, fixed


def _has_matrix(module: nn.Module) -> bool:
    """Whether rules may name a module: linears, and what stays as it is anyway, such as embeddings and routers."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() > 1


def _one_matrix(skeleton: nn.Module, architecture: Architecture) -> Iterator[list[str]]:
    """Linears of which engines lay the outputs one after the other: those of a group, of each expert by itself."""
    for prefix, layer in decoder_layers(skeleton, architecture):
        for group in architecture.groups_of(layer):
            yield [f"{prefix}.{name}" for name in group.linears]


def fused_sets(skeleton: nn.Module, architecture: Architecture) -> Iterator[list[str]]:
    """Linears that engines make one matrix of: those of a group, and all experts of a layer."""
    for prefix, layer in decoder_layers(skeleton, architecture):
        experts: list[str] = []
        for group in architecture.groups_of(layer):
            names = [f"{prefix}.{name}" for name in group.linears]
            if architecture.is_expert(group):
                experts += names
            else:
                yield names
        if experts:
            yield experts


def _shared_entry(
    names: list[str], wanted: Mapping[str, Wanted], published: Mapping[str, str]
) -> ModulePlan | None:
    """The entry of linears that engines fuse: none where one of them stays as it is; else all must want the same."""
    entries = {name: wanted[name].entry for name in names}
    plain = [name for name, entry in entries.items() if entry is None]
    if plain:
        if len(plain) < len(names) and any(wanted[name].by_rule for name in plain):
            log.warning(
                "%s and %d linears that engines fuse with it stay as they are",
                published[plain[0]],
                len(names) - 1,
            )
        return None
    first = names[0]
    other = next((name for name in names if entries[name] != entries[first]), None)
    if other is not None:
        raise RecipeError(
            f"modules: {published[first]} and {published[other]} are one matrix in engines and want different schemes "
            f"or methods ({wanted[first].words}; {wanted[other].words}); give one rule that matches both"
        )
    return entries[first]
