"""What a walk holds in memory at most: docs/checkpoint.md, "Memory and disk of a run"."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lowbit_quantize.check.forecast import BASE_BYTES
from lowbit_quantize.check.groups import Group, groups_of, kinds_of
from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.plan import Plan

FLOAT32_BYTES = 4
PRUNING_SQUARES = 6  # matrices of a linear's inputs by its inputs, while channels are chosen
FACTOR_SQUARES, SCALING_SQUARES = 1, 1  # beside the Hessian: its factor; it as another scale makes it
WEIGHT_COPIES = (
    4  # of a group's weights: as they are read, what their drift says, their target, and that in parts
)
BOUND_FACTOR, BOUND_REST_BYTES = 1.25, 1_500_000_000


def memory_bound_bytes(plan: Plan, streams: int) -> int:
    """What a walk stays below: 1.25 x (the larger of two + 2 x largest layer + streams) + 1.5 GB; on a GPU, there.

    The two are embedding and head, before all layers and after them, and what a stage of a layer works with.
    Where the model's own code around its layers is run, all that this holds counts as well as the embedding.
    A pass that trains a layer holds more of it, and what the base gives for the calibration text.
    Of layers that route, twice what is around the experts counts, and four experts; of their streams, four times as
    much: what experts are called with, and what they have given so far. Where channels are pruned, the Hessians of the
    widest linear count.
    """
    config = plan.config
    embedding = config.vocab_size * config.hidden_size * BASE_BYTES
    outside = (embedding if plan.tied else 2 * embedding) + _around_bytes(plan)
    weights = max(_at_once(layer, plan.architecture) for layer in plan.walked.layers)
    trained = max((one.bytes_a_weight for one in plan.passes), default=0)
    pruned = any(one.resizes for one in plan.passes)
    pruning = PRUNING_SQUARES * FLOAT32_BYTES * _widest(plan) ** 2 if pruned else 0
    kept = streams * (4 if plan.architecture.experts else 1) * (2 if trained else 1)
    held = max(outside, working_bytes(plan)) + (2 * BASE_BYTES + trained) * weights + kept
    return int(BOUND_FACTOR * held) + pruning + BOUND_REST_BYTES


def working_bytes(plan: Plan) -> int:
    """What the largest stage of a layer's quantizing holds beside the layer: Hessians, a factor, weights in float32."""
    most = 0
    for index, kind, _ in kinds_of(plan):
        stages: dict[int, list[Group]] = {}
        for group in groups_of(plan, index, kind):
            if group.entry is not None:
                stages.setdefault(group.of.stage if plan.paired else 0, []).append(group)
        scaled = any(
            group.entry.input_scalers for groups in stages.values() for group in groups if group.entry
        )
        # A scale that folds into a linear of an earlier stage is chosen there.
        together = [[group for groups in stages.values() for group in groups]] if scaled else stages.values()
        most = max([most, *map(_stage_numbers, together)])
    return most * FLOAT32_BYTES


def _stage_numbers(groups: Sequence[Group]) -> int:
    """Numbers in float32 that are held while these groups are observed and then quantized, one after the other."""
    seen = alone = 0
    for group in groups:
        entry, square = group.entry, group.inputs**2
        assert entry is not None
        copies = WEIGHT_COPIES * group.inputs * group.outputs
        if any("hessian" in method.needs for method in entry.methods):
            seen += square
        if entry.compensates:
            seen += 2 * group.drift_rows * group.inputs
            copies += FACTOR_SQUARES * square
        alone = max(alone, copies + SCALING_SQUARES * square * bool(entry.input_scalers))
    return seen + alone


def _widest(plan: Plan) -> int:
    """Inputs of the widest linear of a layer that walks."""
    linears = (one for layer in plan.walked.layers for one in layer.modules())
    return max(one.in_features for one in linears if isinstance(one, nn.Linear))


def _around_bytes(plan: Plan) -> int:
    """Bytes of the module that holds the decoder layers, without them, where its code is run."""
    if plan.architecture.stream.plain:
        return 0
    parent, _, layers = plan.architecture.layers.rpartition(".")
    tensors = plan.skeleton.get_submodule(parent).state_dict().items()
    numbers: int = sum(one.numel() for name, one in tensors if not name.startswith(f"{layers}."))
    return numbers * BASE_BYTES


def _at_once(layer: Any, architecture: Architecture) -> int:
    """Parameters of a layer that are in memory together, as dense layers are counted."""
    whole: int = sum(one.numel() for one in layer.parameters())
    if not architecture.has_experts(layer):
        return whole
    experts = layer.get_submodule(architecture.experts)
    one: int = sum(parameter.numel() for parameter in experts[0].parameters())
    return 2 * (whole - len(experts) * one) + 4 * one
