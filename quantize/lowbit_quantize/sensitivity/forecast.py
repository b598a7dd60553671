"""What a measurement of sensitivities needs: arithmetic on shapes, before any token."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit_quantize.check.effort import rate
from lowbit_quantize.check.forecast import stream_width
from lowbit_quantize.check.memory import BOUND_FACTOR, BOUND_REST_BYTES
from lowbit_quantize.model.architecture import kind_of
from lowbit_quantize.model.decoder import BATCH_TOKENS
from lowbit_quantize.model.experts.routing import USED
from lowbit_quantize.plan import decoder_layers
from lowbit_quantize.sensitivity.changes import SAMPLED_ROWS
from lowbit_quantize.sensitivity.gradients import LOGITS_BYTES
from lowbit_quantize.sensitivity.measure import Prepared

PASSES = 5  # of one text: two go forward, one is observed, one goes forward and back
LOGITS_COPIES = 4  # that are in memory at once: themselves, their logarithms, and gradients of both
OTHERS = 2.0  # a run's time over its products'
LAYER_COPIES = 3  # of a layer in float32: itself, a group's weights and what a candidate serves of them
HEAD_PASSES = 2  # the logits, and their gradient back
SEARCHES = 4  # a candidate costs about so many products of its weight by a square as wide as its inputs


@dataclass(frozen=True)
class Forecast:
    """Bytes and seconds, at most and about."""

    memory_bytes: int
    disk_bytes: int
    streams_bytes: int
    seconds_here: float

    def report(self) -> dict[str, Any]:
        return {
            "memory_bound_bytes": self.memory_bytes,
            "streams_bytes": self.streams_bytes,
            "run_disk_bytes": self.disk_bytes,
            "seconds_here": float(
                f"{self.seconds_here:.2g}"
            ),  # two digits: a tiny model takes less than a tenth
        }


def forecast(prepared: Prepared, memory_limit_bytes: int) -> Forecast:
    """Of a run whose hidden states are files beyond `memory_limit_bytes`."""
    plan, tokens = prepared.plan, prepared.scored.ids.numel()
    length, item = prepared.scored.ids.shape[1], plan.dtype.itemsize
    layers = [layer for _, layer in decoder_layers(plan.skeleton, plan.architecture)]
    streams = 2 * tokens * stream_width(plan) * item * (len(layers) + 1)
    spilled = max(0, streams - memory_limit_bytes)
    largest = max(_layer_bytes(layer, tokens, min(tokens, max(BATCH_TOKENS, length))) for layer in layers)
    words, hidden = plan.config.vocab_size, plan.config.hidden_size
    head = words * hidden * (item + 4) + LOGITS_COPIES * max(LOGITS_BYTES, 4 * words)
    memory = BOUND_FACTOR * (max(largest, head) + streams - spilled) + BOUND_REST_BYTES
    unpacked = plan.parameters * item if plan.reference.kind == "gguf" else 0
    return Forecast(int(memory), spilled + unpacked, streams, _seconds(prepared, layers))


def _layer_bytes(layer: nn.Module, tokens: int, batch: int) -> int:
    """Of a layer in float32, its Hessians, and what its linears read and gave, of a batch with its graph besides."""
    weights = sum(parameter.numel() for parameter in layer.parameters())
    shapes = [one.weight.shape for one in layer.modules() if isinstance(one, nn.Linear)]
    routed = layer.get_submodule(kind_of(layer).experts) if kind_of(layer).experts else None
    experts = len(routed) if routed is not None else 1  # type: ignore[arg-type]
    seen = sum(outputs + inputs for outputs, inputs in shapes) // experts
    squares = sum(inputs * inputs for inputs in {inputs for _, inputs in shapes})
    return 4 * (LAYER_COPIES * weights + squares * 2 + 3 * batch * seen) + 2 * tokens * seen


def _seconds(prepared: Prepared, layers: list[nn.Module]) -> float:
    """At the rates of this process's threads, which are measured for a moment."""
    plan, candidates = prepared.plan, len(prepared.tables)
    head = plan.config.vocab_size * plan.config.hidden_size
    forward, exact = 2.0 * prepared.scored.ids.numel() * HEAD_PASSES * head, 0.0
    for layer in layers:
        for name, one in layer.named_modules():
            if not isinstance(one, nn.Linear):
                continue
            tokens = prepared.scored.ids.numel() * _share(prepared, layer, name)
            inputs, rows = one.in_features, min(one.out_features, SAMPLED_ROWS)
            forward += 2.0 * tokens * inputs * (PASSES * one.out_features + rows * candidates)
            exact += inputs * inputs * (tokens + inputs * candidates / 3 + SEARCHES * candidates * rows)
    seconds: float = OTHERS * (forward / rate(torch.bfloat16) + exact / rate(torch.float32))
    return seconds


def _share(prepared: Prepared, layer: nn.Module, name: str) -> float:
    """Of all tokens, those that go through a linear of a layer: a routed expert's get some."""
    experts, config = kind_of(layer).experts, prepared.plan.config
    if not experts or not name.startswith(f"{experts}."):
        return 1.0
    used = next((getattr(config, key) for key in USED if hasattr(config, key)), 1)
    routed: Any = layer.get_submodule(experts)
    share: float = used / len(routed)
    return share
