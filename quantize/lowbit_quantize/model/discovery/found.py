"""A model's architecture, found: its twin runs once, each kind of layer is probed, and put on real widths."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from lowbit_core.errors import ModelError
from lowbit_quantize.model.architecture import Architecture, Fold, LayerKind, LinearGroup, set_kind
from lowbit_quantize.model.discovery.ends import ends_of
from lowbit_quantize.model.discovery.folds import FoundFold, find_folds
from lowbit_quantize.model.discovery.half import check_half
from lowbit_quantize.model.discovery.narrow import block_rows
from lowbit_quantize.model.discovery.probe import ProbedLayer, same_tensor
from lowbit_quantize.model.discovery.roles import (
    Attention,
    attention_of,
    closing_of,
    leaving,
    middle_of,
    reaches_others,
    residual_of,
    router_of,
    stages_of,
)
from lowbit_quantize.model.discovery.twin import make_twin
from lowbit_quantize.model.experts.routing import Routing
from lowbit_quantize.model.families import FACTS, OTHERS, EngineFacts
from lowbit_quantize.model.reference import ModelReference
from lowbit_quantize.model.skeleton import build_skeleton

SMALL = 128, 32  # a linear with at most so many outputs, each from so many inputs as well, is left as it is
LEAST_OUTPUTS = 32  # and one with fewer, which no engine's kernel takes


_known: dict[str, Architecture] = {}  # by configurations, in this process


def open_model(reference: ModelReference) -> tuple[Architecture, nn.Module]:
    """A model without weights, and what must be known of it; raises ModelError where it is none that can be walked."""
    config = reference.config
    try:
        skeleton = build_skeleton(config)
    except Exception as error:  # whatever a wrong configuration makes of transformers' code
        raise ModelError(
            f"{reference.name}: no model can be built from its configuration: {error!r}"
        ) from error
    try:
        return find_architecture(config, skeleton), skeleton
    except ModelError as error:
        raise ModelError(f"{reference.name}: {error}") from error
    except Exception as error:  # whatever a layer of which nothing is known does while it is probed
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ModelError(
            f"{reference.name} has the architecture {config.model_type!r}, which cannot be found by running it "
            f"({words}); please report it with its config.json"
        ) from error


def find_architecture(config: Any, skeleton: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Architecture:
    """The architecture of a configuration, whose `skeleton` has the real widths; its layers are told their kinds.

    Raises ModelError where it cannot be walked, or does not run in `dtype`.
    """
    key = f"{type(skeleton).__name__} {dtype} {config.to_json_string(use_diff=False)}"
    if key not in _known:
        _known[key] = _found(config, skeleton, dtype)
    architecture = _known[key]
    layers: Any = skeleton.get_submodule(architecture.layers)
    for layer, kind in zip(layers, architecture.kinds, strict=True):
        set_kind(layer, kind)
    return architecture


def _found(config: Any, skeleton: nn.Module, dtype: torch.dtype) -> Architecture:
    with torch.random.fork_rng(devices=[]):
        twin = make_twin(config)
        ends = ends_of(twin)
        layers: Any = skeleton.get_submodule(twin.layers)
        if not any(isinstance(one, nn.Linear) for number in twin.calls for one in layers[number].modules()):
            raise ModelError(
                f"{config.model_type} has no linear layers in its decoder that could be quantized"
            )
        rows = block_rows(twin.config)
        probed = {number: ProbedLayer(call, rows) for number, call in twin.calls.items()}
        check_half(probed, skeleton, twin.layers, dtype)
        first = {number: describe(layer, layers[number]) for number, layer in probed.items()}
    hidden = next((number for number, kind in first.items() if kind.experts and not kind.router), None)
    if hidden is not None:
        raise ModelError(
            f"{config.model_type}: the router of layer {hidden}'s experts does not show: no module with a matrix reads "
            "what the experts read; please report it with its config.json"
        )
    text = config.get_text_config()
    facts = (FACTS | OTHERS).get(text.model_type, EngineFacts())
    return Architecture(
        model_type=text.model_type,
        kinds=tuple(first[number] for number in twin.kinds),
        layers=twin.layers,
        stream=replace(twin.form, around=ends.around),
        latent_cache=getattr(text, "kv_lora_rank", None) is not None,
        renamed=facts.renamed,
        kv_scales=facts.kv_scales,
        tested=text.model_type in FACTS,
        **{one.name: getattr(ends, one.name) for one in fields(ends) if one.name != "around"},
    )


def describe(layer: ProbedLayer, real: nn.Module) -> LayerKind:
    """How a layer of a twin is made, at the widths of the `real` one, which may have no weights.

    Raises ModelError where the routed experts of a twin are given no tokens, so that nothing shows of them.
    """
    attention, (router, entrance) = attention_of(layer), router_of(layer)
    if layer.experts and len(layer.module.get_submodule(layer.experts)) and not layer.first_expert:  # type: ignore[arg-type]
        raise ModelError(
            f"no expert of {layer.experts} was given a token; please report it with its config.json"
        )
    inputs = _inputs(layer)
    folds, dropped = find_folds(layer, inputs)
    names = [
        (place, group)
        for place, readers in inputs.items()
        for group in _split(layer, real, readers, attention, router)
    ]
    order = {name: number for number, name in enumerate(layer.base.order)}
    first = {
        place: min(order.get(layer.reads(one), 0) for one in readers) for place, readers in inputs.items()
    }
    names.sort(key=lambda one: (first[one[0]], not layer.expert_of(one[1][0])))
    stages = stages_of(layer, [group for _, group in names])
    groups = []
    for (place, linears), stage in zip(names, stages, strict=True):
        others = tuple(
            name for name in inputs[place] if not _quantizable(layer, real, name, attention, router)
        )
        group = LinearGroup(linears, _fold_of(folds, linears, real), others, stage=stage)
        groups.append(_for_all_experts(layer, _with_roles(layer, group, attention)))
    block, middle = layer.experts.rpartition(".")[0], middle_of(layer, attention)
    return LayerKind(
        tuple(groups), attention.module, attention.end, attention.outputs, middle,
        block, layer.experts, router, entrance, layer.outputs, leaving(layer), _routes_alone(layer, block, router),
        tuple(dropped), closing_of(layer, middle),
    )  # fmt: skip


def _with_roles(layer: ProbedLayer, group: LinearGroup, attention: Attention) -> LinearGroup:
    """A group and what its linears are for in the layer.

    A linear whose output all experts read is no fold: each expert would divide it by a scale of its own.
    """
    first, fold = group.linears[0], group.fold
    inside = bool(attention.module) and first.startswith(f"{attention.module}.")
    enters = bool(layer.expert_of(first)) and layer.reads(first) == layer.experts
    if enters and fold is not None and not fold.norm:
        fold = None
    return replace(
        group,
        fold=fold,
        attended=inside and reaches_others(layer, group.linears),
        residual="" if layer.expert_of(first) else residual_of(layer, first),
        cached=fold is not None and not fold.norm and first == attention.end,
        enters=enters,
    )


def _routes_alone(layer: ProbedLayer, block: str, router: str) -> bool:
    """Whether the block, called with nothing but what it reads, calls its experts as it does in the layer."""
    if not block or not router:
        return True
    parts = LayerKind((), moe_block=block, experts=layer.experts, router=router)
    read = layer.base.inputs[block]
    try:
        with torch.no_grad():
            Routing(layer.module, parts)(read.reshape(-1, read.shape[-1]))
    except Exception:  # whatever a block does that misses what it is told
        return False
    return True


def _inputs(layer: ProbedLayer) -> dict[str, list[str]]:
    """All modules with a matrix that read the same tensor, by the first whose input it is; of experts, all of them."""
    found: dict[str, list[str]] = {}
    for name in layer.names:
        weight = layer.own_weight(name)
        place = layer.reads(name)
        if weight is None or weight.dim() != 2 or place not in layer.base.inputs:
            continue
        read = layer.base.inputs[place]
        one = next((other for other in found if same_tensor(layer.base.inputs[other], read)), place)
        found.setdefault(one, []).append(name)
    return found


def _split(
    layer: ProbedLayer, real: nn.Module, readers: Sequence[str], attention: Attention, router: str
) -> Iterator[tuple[str, ...]]:
    """The linears to quantize, those of one module together; of experts those of the first."""
    by_parent: dict[str, list[str]] = {}
    for name in readers:
        if layer.expert_of(name) in ("", layer.first_expert) and _quantizable(
            layer, real, name, attention, router
        ):
            by_parent.setdefault(name.rpartition(".")[0], []).append(name)
    yield from map(tuple, by_parent.values())


def _quantizable(layer: ProbedLayer, real: nn.Module, name: str, attention: Attention, router: str) -> bool:
    """Whether a reader is a linear that is worth it: no router, no gate of a few channels outside attention."""
    module = real.get_submodule(
        name if not layer.expert_of(name) else name.replace(f".{layer.expert_of(name)}.", ".0.")
    )
    if not isinstance(module, nn.Linear) or name == router:
        return False
    most, each = SMALL
    few = module.out_features <= most and module.out_features * each <= module.in_features
    few = few or module.out_features < LEAST_OUTPUTS
    adds = layer.base.outputs[name].numel() == layer.one_copy if name in layer.base.outputs else False
    return not few or adds or name.rpartition(".")[0] == attention.module


def _fold_of(folds: Sequence[FoundFold], linears: tuple[str, ...], real: nn.Module) -> Fold | None:
    """The fold of a group, at real widths; a norm before anything else."""
    fitting = [one.fold for one in folds if set(linears) <= set(one.readers)]
    for fold in sorted(fitting, key=lambda one: not one.norm):
        columns = real.get_submodule(linears[0]).in_features
        rows = len(real.get_submodule(fold.producer).weight)  # type: ignore[arg-type]
        spread = next(fold.spread.at(rows, columns), None)  # type: ignore[arg-type]
        if spread is not None:
            return replace(fold, spread=spread)
    return None


def _for_all_experts(layer: ProbedLayer, group: LinearGroup) -> LinearGroup:
    """A group of the first expert as one of each."""
    if not layer.expert_of(group.linears[0]):
        return group
    first, every = f"{layer.experts}.{layer.first_expert}.", f"{layer.experts}.*."
    fold = group.fold and replace(group.fold, producer=group.fold.producer.replace(first, every))
    return replace(group, linears=tuple(name.replace(first, every) for name in group.linears), fold=fold)
