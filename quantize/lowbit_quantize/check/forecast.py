"""What a planned run writes, what it needs, and what its checkpoint needs to be served: arithmetic on shapes.

The serving figures follow docs/deploy.md: weights and cache of a rank, and 2 GiB beside them, in 0.9 of a device.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lowbit_core.model_shape import BYTES_PER_VALUE, shape_from_config
from lowbit_quantize.check.sharding import key_value_heads, parts
from lowbit_quantize.model.architecture import kind_of, linear_of
from lowbit_quantize.model.skeleton import text_tensors
from lowbit_quantize.model.streams.form import DIGITS
from lowbit_quantize.plan import Plan, decoder_layers
from lowbit_quantize.quality.dataset import TokenText, judging_ids
from lowbit_quantize.walk.baselines import FLOAT32

GIB = 1 << 30
USABLE = 0.9  # of a device's memory, the engine's share
OVERHEAD_BYTES = 2 * GIB  # runtime, activations and graphs on each device
HEADER_BYTES = 80  # of a tensor in a safetensors header, its name apart
INDEX_ENTRY_BYTES = 50  # of a tensor in the index, its name apart
KV_SCALES_BYTES = 2 * 4  # of a layer, or of a head
BASE_BYTES = 2  # of a number that is not quantized
DISK_MARGIN_BYTES = 64 << 20
BLOCK_TOKENS = 16  # of the paged cache


@dataclass(frozen=True)
class Tensor:
    """One weight of the checkpoint: its module, its bytes, and over how many ranks' parts it may be split."""

    name: str
    bytes: int
    files: int  # tensors that it is stored as


def tensors(plan: Plan) -> Iterator[Tensor]:
    """Every weight that the checkpoint will hold, by its name in the model."""
    skip = f"{plan.architecture.head}.weight" if plan.tied else ""
    text = text_tensors(plan.skeleton, plan.architecture)
    for name, parameter in plan.skeleton.state_dict().items():
        shape = plan.shape(name, tuple(parameter.shape))
        if name == skip or name not in text or shape is None:
            continue
        entry = plan.modules.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if entry is not None:
            yield Tensor(name, *entry.scheme.bytes(*shape))
        else:
            size = plan.kept_types.dtype(name, plan.dtype).itemsize
            yield Tensor(name, torch.Size(shape).numel() * size, 1)


def tensor_bytes(plan: Plan, carried: int = 0) -> int:
    """Bytes of all tensors of the checkpoint, KV scales included, and what is carried over beside the model."""
    return sum(tensor.bytes for tensor in tensors(plan)) + _scale_pairs(plan) * KV_SCALES_BYTES + carried


def disk_bytes(plan: Plan, carried: int = 0) -> int:
    """Bytes of the shards and their index."""
    published = plan.names.published
    names = sum(
        tensor.files * (2 * len(published(tensor.name)) + HEADER_BYTES + INDEX_ENTRY_BYTES)
        for tensor in tensors(plan)
    )
    return tensor_bytes(plan, carried) + names


def streams_bytes(plan: Plan, calibration: TokenText, heldout: TokenText) -> int:
    """Bytes of all hidden states that walk: calibration text (in both models where paired), held-out text in both.

    With them go a few held-out sequences as baselines.
    """
    tokens = (2 if plan.paired else 1) * calibration.ids.numel() + 2 * judging_ids(
        calibration, heldout
    ).numel()
    for name, rows in plan.baselines(heldout.domains).items():
        tokens += (2 if name == FLOAT32 else 1) * len(rows) * heldout.ids.shape[1]
    return tokens * stream_width(plan) * BASE_BYTES


def stream_width(plan: Plan) -> int:
    """Numbers that walk for each token, at most."""
    stream = plan.architecture.stream
    left: int = sum(
        linear_of(layer, name).out_features
        for _, layer in decoder_layers(plan.skeleton, plan.architecture)
        for name in kind_of(layer).leaves
    )
    return stream.copies * int(plan.config.hidden_size) + left + (0 if stream.plain else DIGITS)


def run_disk_bytes(plan: Plan, streams: int, stream_memory_bytes: int, carried: int = 0) -> int:
    """Bytes that a run needs at its peak: the result (twice where passes are on trial), a GGUF base unpacked, streams
    as they left the last layer and the one that is being finished, and those that do not fit the memory, which are
    files.
    """
    results = 2 if any(one.on_trial for one in plan.passes) else 1
    unpacked = plan.parameters * BASE_BYTES if plan.reference.kind == "gguf" else 0
    generations = 3 if streams > stream_memory_bytes else 2
    return results * disk_bytes(plan, carried) + unpacked + generations * streams + DISK_MARGIN_BYTES


def rank_bytes(plan: Plan, size: int) -> int:
    """Bytes of the weights on one of `size` tensor-parallel ranks."""
    return sum(tensor.bytes // _ranks(plan, tensor.name, size) for tensor in tensors(plan))


def kv_bytes_per_token(plan: Plan, size: int) -> int:
    """Bytes that one token takes in the cache of one rank."""
    config = plan.config
    shape = shape_from_config(config.to_dict())
    if plan.architecture.latent_cache:
        return shape.kv_bytes_per_token("bfloat16")
    heads, in_fp8 = max(1, key_value_heads(config) // size), len(plan.fp8_layers)
    layers = in_fp8 * BYTES_PER_VALUE["fp8"] + (shape.layers - in_fp8) * BYTES_PER_VALUE["bfloat16"]
    return 2 * layers * heads * shape.head_dim


def kv_tokens(plan: Plan, size: int, device_bytes: float) -> int:
    """Tokens that the cache holds on `size` devices of so much memory; 0 when the weights do not fit."""
    free = USABLE * device_bytes - OVERHEAD_BYTES - rank_bytes(plan, size)
    return max(0, int(free // kv_bytes_per_token(plan, size)) // BLOCK_TOKENS * BLOCK_TOKENS)


def _scale_pairs(plan: Plan) -> int:
    """Pairs of scales: one a layer, or one a head of each."""
    if not plan.fp8_cache:
        return 0
    heads = key_value_heads(plan.config) if plan.scales_by_head else 1
    return heads * sum(bool(kind.attention) for kind in plan.architecture.kinds)


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
    return parts(module, plan.config, size)
