"""Refuses, before anything is loaded, what the engine cannot run on this machine or would compute wrong.

vLLM's own message for quantized experts on an unfit CPU is `No WNA16 MoE backend supports the deployment
configuration`, at the end of a worker's traceback. vLLM itself says what this machine can do; what the checkpoint
needs is read from config.json and its tensor names, so this works for checkpoints of other tools too.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowbit_core.cpu_speeds import ZENTORCH_EXTRA
from lowbit_core.errors import CheckpointError, ConfigError
from lowbit_server.checkpoint import Checkpoint
from lowbit_server.config import Device, ServeConfig
from lowbit_server.engine.cpu_linears import groups_of, unfit_kind
from lowbit_server.engine.interface import Rounded
from lowbit_server.engine.kv_scales import read_checkpoint_scales
from lowbit_server.engine.stored_numbers import tensor_names

EXPERT_CODES = re.compile(r"\.experts\.(?:.*\.)?(?:weight_packed|qweight)$")
EXPERT_SCALES = re.compile(r"\.experts\.(?:.*\.)?weight_scale$")
EIGHT = 8
ZENTORCH = f"an AMD processor with zentorch ({ZENTORCH_EXTRA})"
NEEDS: Mapping[Rounded, str] = {
    "none": f"it needs AMX with 4 bits in groups of 64 or 128, or {ZENTORCH}",
    "int": f"it needs AMX, or {ZENTORCH}",
    "float": "it has none on any CPU",
}
PLAIN_EXPERTS = "a rule {match: '*.experts.*', scheme: none} in modules (recipe awq-g64-plain-experts)"


@dataclass(frozen=True)
class QuantizedExperts:
    """Bits and group size of a checkpoint's routed experts, how what they read is rounded, a tensor as evidence."""

    bits: int
    group_size: int
    tensor: str
    rounded: Rounded = "none"

    def __str__(self) -> str:
        if self.rounded == "none":
            return f"{self.bits}-bit experts in groups of {self.group_size}"
        return f"experts in {'int8' if self.rounded == 'int' else 'FP8'} with their inputs"


# Whether the engine has a kernel for experts of these bits, this group size and inputs rounded so on this machine.
RunsExperts = Callable[[int, int, Rounded], bool]


@dataclass(frozen=True)
class Machine:
    """What vLLM says of this machine, asked only where a checkpoint hangs on it."""

    runs_experts: RunsExperts
    runs_fp8_blocks: Callable[[], bool]


def refuse_unfit_machine(
    config: ServeConfig, checkpoint: Checkpoint, device: Device, machine: Machine
) -> None:
    """Raise CheckpointError when the engine on this machine cannot run the checkpoint as it was measured."""
    if device == "cpu":
        _refuse_unfit_linears(checkpoint, machine.runs_fp8_blocks)
        _refuse_quantized_experts(checkpoint, machine.runs_experts)
        _refuse_plain_positions(checkpoint)
        _refuse_scales_of_heads(config, checkpoint)
    _refuse_latent_scales(config, checkpoint)


def refuse_unknown_parsers(config: ServeConfig, known: Mapping[str, Sequence[str]]) -> None:
    """Raise ConfigError for a parser that the engine does not have."""
    for flag, given in (
        ("--tool-call-parser", config.tool_call_parser), ("--reasoning-parser", config.reasoning_parser)
    ):  # fmt: skip
        if given is not None and given not in known[flag]:
            raise ConfigError(f"{flag} {given} is not known; choose one of {', '.join(known[flag])}")


def quantized_experts(checkpoint: Checkpoint) -> QuantizedExperts | None:
    """The checkpoint's quantized experts; None where it has no experts or they are not quantized."""
    if not checkpoint.quantization:
        return None
    names = list(tensor_names(checkpoint.directory))
    if tensor := next(filter(EXPERT_CODES.search, names), None):
        bits, group_size = _weight_format(checkpoint.quantization, tensor.rpartition(".")[0])
        return QuantizedExperts(bits, group_size, tensor)
    tensor = next(filter(EXPERT_SCALES.search, names), None)
    rounded = _rounded(checkpoint.quantization, tensor.rpartition(".")[0]) if tensor else None
    return QuantizedExperts(EIGHT, -1, tensor, rounded) if tensor and rounded else None


def _rounded(quantization: dict[str, Any], module: str) -> Rounded | None:
    """The numbers of a module's weights and inputs, both of eight bits and with a scale a row; None of others."""
    for group in quantization.get("config_groups", {}).values():
        weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
        eight = weights.get("num_bits") == inputs.get("num_bits") == EIGHT
        by_row = weights.get("strategy") in ("channel", "tensor")
        if (
            eight
            and by_row
            and any(target in (module, "Linear") or _targets(target, module) for target in group["targets"])
        ):
            return "int" if weights.get("type") == "int" else "float"
    return None


def _weight_format(quantization: dict[str, Any], module: str) -> tuple[int, int]:
    """Bits and group size of a module's integer weights; -1 means one scale per channel, as in vLLM."""
    groups = [group for group in quantization.get("config_groups", {}).values() if group.get("weights")]
    named = [group for group in groups if any(_targets(target, module) for target in group["targets"])]
    weights = [group["weights"] for group in named or groups]
    found = next((given for given in weights if given.get("type") == "int"), quantization)
    bits = found.get("num_bits", found.get("bits", 4))
    return int(bits), int(found.get("group_size") or -1)


def _targets(target: str, module: str) -> bool:
    """Whether a target of a quantization configuration is a module's name, or a pattern that matches it."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module


def _refuse_quantized_experts(checkpoint: Checkpoint, runs_experts: RunsExperts) -> None:
    found = quantized_experts(checkpoint)
    if found and not runs_experts(found.bits, found.group_size, found.rounded):
        raise CheckpointError(
            f"{checkpoint.directory} has {found} ({found.tensor}), and the engine has no kernel for them on this "
            f"processor: {NEEDS[found.rounded]}; serve it on a GPU, or quantize with the experts in bfloat16: "
            f"{PLAIN_EXPERTS}"
        )


def _refuse_unfit_linears(checkpoint: Checkpoint, runs_fp8_blocks: Callable[[], bool]) -> None:
    """vLLM 0.32 has no CPU kernel for most schemes that GPUs have one for, and for some it needs AMX."""
    for group in groups_of(checkpoint.quantization):
        kind = unfit_kind(group)
        if kind is None or (kind.needs_amx and runs_fp8_blocks()):
            continue
        where = "without AMX, which this one has not" if kind.needs_amx else ""
        raise CheckpointError(
            f"{checkpoint.directory} has {kind.words(group['weights'])}, for which this engine has no kernel on a "
            f"CPU{f' {where}' if where else ''}; serve it on a GPU, or quantize with {kind.instead}"
        )


def _refuse_plain_positions(checkpoint: Checkpoint) -> None:
    """vLLM 0.32's CPU kernel for plain rotary embeddings rotates the wrong numbers of a latent (log.md)."""
    given = checkpoint.config.get("rope_parameters") or checkpoint.config.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    if checkpoint.latent and kind == "default":
        raise CheckpointError(
            f"{checkpoint.directory} has latent attention with plain rotary positions (rope_type: default), which "
            "this engine computes wrong on a CPU; its answers would be wrong; serve it on a GPU"
        )


def _refuse_scales_of_heads(config: ServeConfig, checkpoint: Checkpoint) -> None:
    """vLLM 0.32's attention on CPUs reads one number a layer, the largest of its heads' scales."""
    scheme = checkpoint.quantization.get("kv_cache_scheme") or {}
    if scheme.get("strategy") == "attn_head" and config.kv_cache_dtype != "bfloat16":
        raise CheckpointError(
            f"{checkpoint.directory} has KV scales for each head, which this engine does not read on a CPU; give "
            "--kv-cache-dtype bfloat16, serve it on a GPU with FlashAttention 3 (NVIDIA's from 9.0 on), or quantize "
            "with kv_cache: fp8"
        )


def _refuse_latent_scales(config: ServeConfig, checkpoint: Checkpoint) -> None:
    """vLLM 0.32 loads no KV scale for latent attention under any name (log.md): an FP8 cache runs with 1."""
    if not checkpoint.latent or config.kv_cache_dtype != "fp8":
        return
    scales = read_checkpoint_scales(checkpoint.directory).values()
    if any((scale.k_scale, scale.v_scale) != (1.0, 1.0) for scale in scales):
        raise CheckpointError(
            f"{checkpoint.directory} has KV scales, which this engine does not load for latent attention: "
            "--kv-cache-dtype fp8 would run with 1; leave the flag out or give bfloat16"
        )
