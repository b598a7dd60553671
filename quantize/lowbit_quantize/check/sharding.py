"""Whether vLLM's kernels take a planned checkpoint when a model is split over devices.

The conditions are vLLM 0.32's (`MarlinLinearKernel`, `CPUWNA16LinearKernel`, the fused experts' Marlin kernel,
`verify_group_size_divides_partition`); tests/contract holds them against the installed one. Attention heads and each
network's middle are split over tensor-parallel ranks; key and value heads are repeated where there are fewer than
ranks. Routed experts are split too, or dealt out whole where expert parallelism is on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from lowbit_quantize.model.architecture import LinearGroup, linear_of
from lowbit_quantize.model.skeleton import given
from lowbit_quantize.plan import Plan, decoder_layers
from lowbit_quantize.schemes.scheme import Kernel, Scheme

PARALLEL_SIZES = (1, 2, 4, 8)
SPLITS_INPUTS = ("o_proj", "down_proj")
VOCABULARY_MULTIPLE = 64  # that engines fill the head's outputs up to
WHOLE = ("q_a_proj", "kv_a_proj_with_mqa")  # what makes a latent is on every rank
KEYS_AND_VALUES = ("k_proj", "v_proj")


@dataclass(frozen=True)
class Shard:
    """The part of some fused linears that one rank holds."""

    name: str
    outputs: int
    inputs: int
    all_inputs: int
    expert: bool
    scheme: Scheme
    members: tuple[int, ...] = ()  # outputs of each linear of it
    split: bool = False  # over ranks, by its outputs


def parts(name: str, config: Any, size: int) -> int:
    """Into how many different parts a linear is split over `size` ranks."""
    leaf = name.rpartition(".")[2]
    if leaf in WHOLE:
        return 1
    if leaf in KEYS_AND_VALUES:
        return min(size, key_value_heads(config))
    return size


def key_value_heads(config: Any) -> int:
    return int(given(config, "num_key_value_heads") or config.num_attention_heads)


def obstacles(plan: Plan, kernel: Kernel, size: int, *, expert_parallel: bool = False) -> list[str]:
    """Why vLLM would refuse the checkpoint on so many ranks with a kernel; empty when it takes it."""
    found = list(_head_obstacles(plan, size))
    for scheme in dict.fromkeys(entry.scheme for entry in plan.modules.values()):
        found += scheme.obstacles(kernel)
    for shard in _shards(plan, size, expert_parallel):
        found += _shard_obstacles(shard, kernel)
    if expert_parallel and plan.experts and plan.experts % size:
        found.append(f"{plan.experts} experts cannot be dealt evenly to {size} ranks")
    return list(dict.fromkeys(found))


def _head_obstacles(plan: Plan, size: int) -> Iterator[str]:
    config = plan.config
    if config.num_attention_heads % size:
        yield f"{config.num_attention_heads} attention heads do not divide by {size}"
    heads = key_value_heads(config)
    if heads % size and size % heads and not plan.architecture.latent_cache:
        yield f"{heads} key and value heads neither divide by {size} nor divide it"


def _shards(plan: Plan, size: int, expert_parallel: bool) -> Iterator[Shard]:
    """What a rank holds of each kind of fused linears; layers of one kind are alike, and so are experts."""
    config, architecture = plan.config, plan.architecture
    for prefix, layer in decoder_layers(plan.skeleton, architecture):
        for group in architecture.groups_of(layer):
            entry = plan.modules.get(f"{prefix}.{group.linears[0]}")
            if entry is not None and plan.stays(f"{prefix}.{group.linears[0]}"):
                yield _shard(
                    layer,
                    group,
                    entry.scheme,
                    config,
                    1 if _whole(group, expert_parallel) else size,
                )
    if (head := plan.modules.get(architecture.head)) is not None:
        inputs = int(config.hidden_size)
        words = -(-int(config.vocab_size) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        yield Shard(architecture.head, _part(words, size), inputs, inputs, expert=False, scheme=head.scheme)


def _whole(group: LinearGroup, expert_parallel: bool) -> bool:
    """Whether a group lies whole on one rank."""
    return expert_parallel and ".experts." in group.linears[0]


def _shard(layer: nn.Module, group: LinearGroup, scheme: Scheme, config: Any, ranks: int) -> Shard:
    names = group.linears
    expert = ".experts." in names[0]
    linears = {name: linear_of(layer, name) for name in names}
    kind = names[0].replace(f".{names[0].split('.')[2]}.", ".*.") if expert else names[0]
    inputs = linears[names[0]].in_features
    if names[0].endswith(SPLITS_INPUTS):
        outputs = sum(linear.out_features for linear in linears.values())
        whole = tuple(linear.out_features for linear in linears.values())
        return Shard(kind, outputs, _part(inputs, ranks), inputs, expert, scheme, whole)
    members = tuple(
        _part(linear.out_features, parts(name, config, ranks)) for name, linear in linears.items()
    )
    return Shard(kind, sum(members), inputs, inputs, expert, scheme, members, split=ranks > 1)


def _part(features: int, ranks: int) -> int:
    """Features of a rank; 1, which no kernel takes, where they do not divide."""
    return features // ranks if features % ranks == 0 else 1


def _shard_obstacles(shard: Shard, kernel: Kernel) -> Iterator[str]:
    group, multiple = shard.scheme.group_size, shard.scheme.multiple(kernel)
    if group and group < shard.all_inputs and shard.inputs % group:
        yield f"{shard.name}: groups of {group} straddle ranks that hold {shard.inputs} of {shard.all_inputs} inputs"
    if 1 in (shard.outputs, shard.inputs):
        yield f"{shard.name}: its {'outputs' if shard.outputs == 1 else 'inputs'} do not divide"
    elif why := shard.scheme.outputs_misfit(shard.members, split=shard.split):
        yield f"{shard.name}: {why}"
    elif shard.inputs % multiple or shard.outputs % multiple:
        yield f"{shard.name}: {shard.outputs} x {shard.inputs} on a rank are no multiples of {multiple}"
    elif shard.expert:
        gates = not shard.name.endswith(SPLITS_INPUTS)
        hidden, middle = (shard.inputs, shard.outputs // 2) if gates else (shard.outputs, shard.inputs)
        yield from (f"{shard.name}: {why}" for why in shard.scheme.expert_obstacles(kernel, hidden, middle))
