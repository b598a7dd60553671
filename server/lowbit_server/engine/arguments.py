"""vLLM's engine arguments, derived from the flags, the manifest and config.json.

Pure functions that know nothing of vLLM but the names of its arguments. The rule for the context length: the
model's own maximum, or what the KV cache holds if that is less.
"""

import math
from typing import Any

from lowbit_core.errors import ConfigError
from lowbit_core.kv_cache import BLOCK_TOKENS, tokens_that_fit
from lowbit_server.checkpoint import Checkpoint, served_names
from lowbit_server.config import Device, ServeConfig
from lowbit_server.flags import GIB
from lowbit_server.shadow.divergence import SERVED_TOP

DEFAULT_CPU_KV_CACHE_BYTES = 2 * GIB  # the host's memory is shared with everything else that runs there


def derive_engine_arguments(config: ServeConfig, checkpoint: Checkpoint, device: Device) -> dict[str, Any]:
    """vLLM's engine arguments by name, from the flags, the manifest and config.json.

    Raises ConfigError for a flag that this device or this model cannot follow.
    """
    _refuse_what_cannot_be_followed(config, checkpoint, device)
    kv_bytes = _kv_cache_bytes(config, device)
    arguments: dict[str, Any] = checkpoint.engine_arguments(config.kv_cache_dtype) | {
        "model": str(checkpoint.directory),
        "served_model_name": list(served_names(config, checkpoint)),
        "max_model_len": _max_model_len(config, checkpoint, kv_bytes),
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "enforce_eager": config.enforce_eager,
        "max_num_queued_reqs": config.max_num_queued_reqs,
        "allowed_origins": [],  # ours stands before the gateway
        "shutdown_timeout": config.drain_timeout_s,
        "trust_remote_code": config.trust_remote_code,
    }
    optional = {
        "kv_cache_memory_bytes": kv_bytes,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "max_num_seqs": config.max_num_seqs,
        "max_num_queued_tokens": config.max_num_queued_tokens,
        "tool_call_parser": config.tool_call_parser,
        "enable_auto_tool_choice": True if config.tool_call_parser else None,
        "tool_strict_level": config.strict_tools if config.strict_tools != "auto" else None,
        # The engine's own choice among several takes this switch from none of them.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}
        if config.json_whitespace == "none"
        else None,
        # Always where there are keys, because a priority may come with a change of their file. With equal ones it is
        # first come, first served.
        "scheduling_policy": "priority" if config.api_keys else None,
        "reasoning_parser": config.reasoning_parser,
        "max_logprobs": SERVED_TOP if config.shadow else None,  # clients may then ask for as many
        "otlp_traces_endpoint": config.otlp_traces_endpoint,
        "override_generation_config": config.max_output_tokens
        and {"max_new_tokens": config.max_output_tokens},  # also for a request that does not say
    } | _lora_arguments(config)
    given = {name: value for name, value in optional.items() if value is not None}
    return arguments | given | _node_arguments(config)


def _refuse_what_cannot_be_followed(config: ServeConfig, checkpoint: Checkpoint, device: Device) -> None:
    if device == "cpu" and checkpoint.latent and config.kv_cache_dtype == "fp8":
        raise ConfigError(
            "--kv-cache-dtype fp8: the CPU engine caches latent attention in the model's dtype only; leave it out"
        )
    if device == "cpu" and config.pipeline_parallel_size > 1 and config.enforce_eager:
        raise ConfigError(
            "--pipeline-parallel-size with --enforce-eager: this engine then fails at the first request on a CPU; "
            "leave one of them out"
        )
    if config.strict_tools != "auto" and config.tool_call_parser is None:
        raise ConfigError("--strict-tools binds calls of tools, which --tool-call-parser turns on; give both")


def _node_arguments(config: ServeConfig) -> dict[str, Any]:
    """Several nodes run on vLLM's own processes, so that Ray need not be installed and operated."""
    if config.nnodes == 1:
        return {}
    return {
        "distributed_executor_backend": "mp",
        "nnodes": config.nnodes,
        "node_rank": config.node_rank,
        "master_addr": config.master_addr,
        "master_port": config.master_port,
    }


def _lora_arguments(config: ServeConfig) -> dict[str, Any]:
    if not config.lora_modules and config.lora_dir is None:
        return {}
    return {"enable_lora": True, "max_loras": config.max_loras, "max_lora_rank": config.max_lora_rank}


def effective_kv_dtype(config: ServeConfig, checkpoint: Checkpoint) -> str:
    """The dtype of stored keys and values: fp8, or the model's own."""
    return checkpoint.kv_dtype(config.kv_cache_dtype)


def _kv_cache_bytes(config: ServeConfig, device: Device) -> int | None:
    if device == "cpu" and config.gpu_memory_utilization is not None:
        raise ConfigError(
            "--gpu-memory-utilization is for GPUs and this engine runs on the CPU; give --kv-cache-gib"
        )
    if config.kv_cache_memory_bytes is None and device == "cpu":
        return DEFAULT_CPU_KV_CACHE_BYTES
    return config.kv_cache_memory_bytes


def _max_model_len(config: ServeConfig, checkpoint: Checkpoint, kv_bytes: int | None) -> int | None:
    """None leaves it to the engine, which reads the same config.json; -1 tells it to fit the GPU's memory."""
    shape = checkpoint.shape
    if (
        config.max_model_len is not None
        and shape.max_positions
        and config.max_model_len > shape.max_positions
    ):
        raise ConfigError(
            f"--max-model-len {config.max_model_len} is more than the model's {shape.max_positions} positions"
        )
    if kv_bytes is None:
        return config.max_model_len or -1
    fits = _tokens_that_fit(config, checkpoint, kv_bytes)
    if config.max_model_len is not None:
        if config.max_model_len > fits:
            raise ConfigError(
                f"--max-model-len {config.max_model_len} does not fit: {kv_bytes / GIB:.2f} GiB of KV cache "
                f"hold {fits} tokens; lower it or raise --kv-cache-gib"
            )
        return config.max_model_len
    return fits if shape.max_positions and shape.max_positions > fits else None


def _tokens_that_fit(config: ServeConfig, checkpoint: Checkpoint, kv_bytes: int) -> int:
    per_token = _kv_bytes_per_token_and_device(config, checkpoint)
    fits = tokens_that_fit(kv_bytes, per_token)
    if not fits:
        raise ConfigError(
            f"{kv_bytes / GIB:.3f} GiB of KV cache do not hold {BLOCK_TOKENS} tokens of "
            f"{per_token} bytes each; raise --kv-cache-gib"
        )
    return fits


def _kv_bytes_per_token_and_device(config: ServeConfig, checkpoint: Checkpoint) -> int:
    """Bytes that one token takes on the fullest device: its pipeline stage's layers and its share of the KV heads.

    With more devices than KV heads some hold copies; a latent is never split.
    """
    shape = checkpoint.shape
    all_layers = shape.kv_bytes_per_token(effective_kv_dtype(config, checkpoint))
    if skipped := checkpoint.skipped_layers(
        config.kv_cache_dtype
    ):  # these take two bytes where the others take one
        all_layers += len(skipped) * all_layers // shape.layers
    parts = 1 if checkpoint.latent else min(config.tensor_parallel_size, shape.kv_heads)
    stage_layers = math.ceil(shape.layers / config.pipeline_parallel_size)
    return stage_layers * math.ceil(all_layers // shape.layers / parts)
