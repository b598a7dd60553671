"""What a planned run writes, what it needs, and what its checkpoint needs to be served: arithmetic on shapes.

The serving figures follow docs/deploy.md: weights and cache of a rank, and 2 GiB beside them, in 0.9 of a device.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from lowbit_core.model_shape import BYTES_PER_VALUE, shape_from_config
from lowbit_quantize.baselines import FLOAT32, baseline_sequences
from lowbit_quantize.calibration import TokenText
from lowbit_quantize.formats import FORMATS
from lowbit_quantize.grid import GridSpec, Rounded
from lowbit_quantize.plan import Plan
from lowbit_quantize.sharding import experts_kept, key_value_heads, parts

GIB = 1 << 30
USABLE = 0.9  # of a device's memory, the engine's share
OVERHEAD_BYTES = 2 * GIB  # runtime, activations and graphs on each device
HEADER_BYTES = 80  # of a tensor in a safetensors header, its name apart
INDEX_ENTRY_BYTES = 50  # of a tensor in the index, its name apart
KV_SCALES_BYTES = 2 * 4  # of a layer
BASE_BYTES = 2  # of a number that is not quantized
DISK_MARGIN_BYTES = 64 << 20
BLOCK_TOKENS = 16  # of the paged cache
BOUND_FACTOR, BOUND_REST_BYTES = 1.25, 1_500_000_000  # docs/checkpoint.md, "Memory"


@dataclass(frozen=True)
class Tensor:
    """One weight of the checkpoint: its module, its bytes, and over how many ranks' parts it may be split."""

    name: str
    bytes: int
    files: int  # tensors that it is stored as


def tensors(plan: Plan) -> Iterator[Tensor]:
    """Every weight that the checkpoint will hold, by its name in the model."""
    quantized = _quantized(plan)
    skip = f"{plan.architecture.head}.weight" if plan.reference.config.tie_word_embeddings else ""
    for name, parameter in plan.skeleton.state_dict().items():
        module = name.removesuffix(".weight")
        shape = list(parameter.shape)
        if name == skip or _pruned(plan, name):
            continue
        if module in quantized and name.endswith(".weight"):
            spec = GridSpec(
                plan.recipe.weights.bits, plan.recipe.weights.inputs_per_scale, plan.recipe.weights.symmetric
            )
            yield Tensor(name, *_packed(plan.recipe.format, spec, *shape))
            continue
        if plan.pruning and _routes(plan, name) and shape[0] == plan.pruning.experts:
            shape[0] = plan.pruning.kept
        yield Tensor(name, torch.Size(shape).numel() * BASE_BYTES, 1)


def tensor_bytes(plan: Plan) -> int:
    """Bytes of all tensors of the checkpoint, KV scales included."""
    return sum(tensor.bytes for tensor in tensors(plan)) + _scaled_layers(plan) * KV_SCALES_BYTES


def disk_bytes(plan: Plan) -> int:
    """Bytes of the shards and their index."""
    published = plan.architecture.published_name
    names = sum(
        tensor.files * (2 * len(published(tensor.name)) + HEADER_BYTES + INDEX_ENTRY_BYTES)
        for tensor in tensors(plan)
    )
    return tensor_bytes(plan) + names


def streams_bytes(plan: Plan, calibration: TokenText, heldout: TokenText) -> int:
    """Bytes of all hidden states that walk: calibration text (in both models where paired), held-out text in both.

    With them go a few held-out sequences as baselines.
    """
    tokens = (2 if plan.paired else 1) * calibration.ids.numel() + 2 * heldout.ids.numel()
    for name, rows in baseline_sequences(plan, heldout.domains).items():
        tokens += (2 if name == FLOAT32 else 1) * len(rows) * heldout.ids.shape[1]
    return tokens * int(plan.reference.config.hidden_size) * BASE_BYTES


def run_disk_bytes(plan: Plan, streams: int) -> int:
    """Bytes that a run needs at its peak: the result, a GGUF base unpacked, and the streams of two layers."""
    unpacked = plan.parameters * BASE_BYTES if plan.reference.kind == "gguf" else 0
    return disk_bytes(plan) + unpacked + 2 * streams + DISK_MARGIN_BYTES


def memory_bound_bytes(plan: Plan, streams: int) -> int:
    """What a walk stays below: 1.25 x (embedding + head + 2 x largest layer + streams) + 1.5 GB."""
    config = plan.reference.config
    embedding = config.vocab_size * config.hidden_size * BASE_BYTES
    outside = embedding if config.tie_word_embeddings else 2 * embedding
    layers: Any = plan.skeleton.get_submodule(plan.architecture.layers)
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in layers) * BASE_BYTES
    return int(BOUND_FACTOR * (outside + 2 * largest + streams)) + BOUND_REST_BYTES


def rank_bytes(plan: Plan, size: int) -> int:
    """Bytes of the weights on one of `size` tensor-parallel ranks."""
    return sum(tensor.bytes // _ranks(plan, tensor.name, size) for tensor in tensors(plan))


def kv_bytes_per_token(plan: Plan, size: int) -> int:
    """Bytes that one token takes in the cache of one rank."""
    config = plan.reference.config
    shape = shape_from_config(config.to_dict())
    dtype = "fp8" if plan.recipe.kv_cache.dtype == "fp8" else "bfloat16"
    if plan.architecture.latent_cache:
        return shape.kv_bytes_per_token(dtype)
    heads = max(1, key_value_heads(config) // size)
    return 2 * shape.layers * heads * shape.head_dim * BYTES_PER_VALUE[dtype]


def kv_tokens(plan: Plan, size: int, device_bytes: float) -> int:
    """Tokens that the cache holds on `size` devices of so much memory; 0 when the weights do not fit."""
    free = USABLE * device_bytes - OVERHEAD_BYTES - rank_bytes(plan, size)
    return max(0, int(free // kv_bytes_per_token(plan, size)) // BLOCK_TOKENS * BLOCK_TOKENS)


def _quantized(plan: Plan) -> set[str]:
    if plan.recipe.weights.method == "none":
        return set()
    layers: Any = plan.skeleton.get_submodule(plan.architecture.layers)
    return {
        f"{plan.architecture.layers}.{index}.{linear}"
        for index, layer in enumerate(layers)
        for group in plan.architecture.groups_of(layer)
        for linear in group.linears
    } - set(plan.ignored)


def _scaled_layers(plan: Plan) -> int:
    if plan.recipe.kv_cache.dtype == "none" or not FORMATS[plan.recipe.format].carries_kv_scales:
        return 0
    return len(plan.skeleton.get_submodule(plan.architecture.layers))  # type: ignore[arg-type]


def _pruned(plan: Plan, name: str) -> bool:
    found = re.search(rf"\.{re.escape(plan.architecture.experts)}\.(\d+)\.", name) if plan.pruning else None
    return bool(found) and int(found[1]) >= (experts_kept(plan) or 0)  # type: ignore[index]


def _routes(plan: Plan, name: str) -> bool:
    return f".{plan.architecture.router}." in name


def _ranks(plan: Plan, name: str, size: int) -> int:
    """Over how many ranks a weight is split: linears, embedding and head are, the rest is on every rank."""
    module = name.rpartition(".")[0]
    if module in (plan.architecture.embedding, plan.architecture.head):
        return size
    if not name.startswith(f"{plan.architecture.layers}.") or "norm" in name or _routes(plan, name):
        return 1
    if not module.endswith("_proj"):
        return 1
    return parts(module, plan.reference.config, size)


@cache
def _packed(format_name: str, spec: GridSpec, outputs: int, inputs: int) -> tuple[int, int]:
    """Bytes and number of tensors of a linear: what the packer makes of 64 and of 128 outputs goes on in a line."""

    def measured(rows: int) -> tuple[int, int]:
        groups = inputs // spec.width(inputs)
        grid = torch.zeros(rows, groups)
        packed = FORMATS[format_name].pack(
            Rounded(torch.zeros(rows, inputs, dtype=torch.int8), grid + 1, grid, spec)
        )
        return sum(tensor.numel() * tensor.element_size() for tensor in packed.values()), len(packed)

    (fewer, files), (more, _) = measured(64), measured(128)
    return fewer + (more - fewer) * (outputs - 64) // 64, files
