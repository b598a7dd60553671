"""What the server is asked to do, what the checkpoint says, and the engine arguments that follow from both.

`derive_engine_arguments` is pure and knows nothing of vLLM but the names of its arguments. The rule for the
context length: the model's own maximum, or what the KV cache holds if that is less.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lowbit_core.errors import CheckpointError, ConfigError
from lowbit_core.manifest import MANIFEST_NAME, Manifest, read_manifest, verify_files
from lowbit_core.model_shape import ModelShape, read_config, shape_from_config

Device = Literal["cpu", "gpu"]
KVDtype = Literal["auto", "fp8", "bfloat16"]
KV_DTYPES: tuple[str, ...] = get_args(KVDtype)
GIB = 1 << 30
DEFAULT_CPU_KV_CACHE_BYTES = 2 * GIB  # the host's memory is shared with everything else that runs there
KV_BLOCK_TOKENS = 128  # the CPU engine's block; a multiple of every GPU block size
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
ENGINE_DTYPES = ("bfloat16", "float16")  # a float32 checkpoint is left to the engine, as stock vLLM does


@dataclass(frozen=True)
class ServeConfig:
    """The flags of `lowbit serve`, checked one by one; None means: derive it."""

    directory: Path
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    max_model_len: int | None = None
    kv_cache_memory_bytes: int | None = None
    kv_cache_dtype: KVDtype = "auto"
    gpu_memory_utilization: float | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 29501
    max_num_seqs: int | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    lora_modules: tuple[tuple[str, Path], ...] = ()
    lora_dir: Path | None = None
    max_loras: int = 4
    max_lora_rank: int = 16
    max_num_queued_reqs: int = 1024
    max_num_queued_tokens: int | None = None
    api_keys: Path | None = None
    request_timeout_s: int | None = None
    max_header_bytes: int = 64 << 10
    max_body_bytes: int = 32 << 20
    max_prompt_characters: int | None = None
    max_output_tokens: int | None = None
    admin_port: int | None = None
    cors_origins: str = ""
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    otlp_traces_endpoint: str | None = None
    no_request_log: bool = False
    enforce_eager: bool = False
    allow_rejected: bool = False
    skip_hash_check: bool = False
    trust_remote_code: bool = False
    drain_timeout_s: int = 30


@dataclass(frozen=True)
class Checkpoint:
    """A directory that may be served: its config, its shape, and its manifest where it has one."""

    directory: Path
    config: dict[str, Any]
    shape: ModelShape
    manifest: Manifest | None

    @property
    def name(self) -> str:
        """The base model's name without its path, else the directory's name."""
        base = self.manifest.base.name if self.manifest else ""
        return Path(base).name or self.directory.resolve().name

    @property
    def quantization(self) -> dict[str, Any]:
        """`quantization_config` of config.json; empty for an unquantized model."""
        found = self.config.get("quantization_config", {})
        return found if isinstance(found, dict) else {}

    @property
    def declares_fp8_kv(self) -> bool:
        """Whether the engine will read an FP8 cache and its scales from the checkpoint by itself."""
        return bool(self.quantization.get("kv_cache_scheme"))

    @property
    def latent(self) -> bool:
        """Whether attention caches a latent, for which vLLM 0.32 reads no FP8 scheme and no scales."""
        return self.shape.latent_dim is not None

    @property
    def measured_with_fp8_kv(self) -> bool:
        """Whether the manifest says that the model was measured with an FP8 cache."""
        kv_cache = self.manifest.kv_cache if self.manifest else None
        return kv_cache is not None and kv_cache.dtype.startswith(("fp8", "float8"))

    @property
    def measured_with_unit_scales(self) -> bool:
        """Whether that FP8 cache had scales of 1: the checkpoint's format carries none."""
        layers = self.manifest.kv_cache.layers if self.manifest and self.manifest.kv_cache else []
        return bool(layers) and all(layer.k_scale == layer.v_scale == 1.0 for layer in layers)


def open_checkpoint(config: ServeConfig) -> Checkpoint:
    """Read and check a checkpoint before anything expensive starts.

    Raises CheckpointError for a directory that is incomplete, changed, or rejected by its gate.
    """
    manifest = read_manifest(config.directory)
    if manifest is not None:
        _refuse_rejected(config, manifest)
        verify_files(config.directory, manifest, hashes=not config.skip_hash_check)
        _refuse_unlisted_weights(config.directory, manifest)
    elif not any(config.directory.glob("*.safetensors")):
        raise CheckpointError(f"{config.directory} is incomplete: it has no *.safetensors file")
    model_config = read_config(config.directory)
    return Checkpoint(config.directory, model_config, shape_from_config(model_config), manifest)


def refuse_uneven_nodes(config: ServeConfig) -> None:
    """Raise ConfigError where the nodes cannot share the devices evenly, or this node is none of them."""
    devices = config.tensor_parallel_size * config.pipeline_parallel_size
    if devices % config.nnodes:
        raise ConfigError(
            f"--tensor-parallel-size {config.tensor_parallel_size} x --pipeline-parallel-size "
            f"{config.pipeline_parallel_size} = {devices} devices do not divide among --nnodes {config.nnodes}"
        )
    if config.node_rank >= config.nnodes:
        raise ConfigError(
            f"--node-rank {config.node_rank} is none of --nnodes {config.nnodes}: they are counted from 0"
        )


def _refuse_rejected(config: ServeConfig, manifest: Manifest) -> None:
    if not manifest.gate.accepted and not config.allow_rejected:
        raise CheckpointError(
            f"{config.directory} was rejected by its quality gate ({'; '.join(manifest.gate.reasons)}); "
            f"quantize it again with a milder recipe, or give --allow-rejected ({MANIFEST_NAME}: gate)"
        )


def _refuse_unlisted_weights(directory: Path, manifest: Manifest) -> None:
    """The engine loads every weight file that it finds: one that is not listed was added later."""
    found = (path.name for path in sorted(directory.iterdir()) if path.suffix in WEIGHT_SUFFIXES)
    if unlisted := [name for name in found if name not in manifest.files]:
        raise CheckpointError(
            f"{directory} holds {', '.join(unlisted)}, which {MANIFEST_NAME} does not list: "
            "remove what was added"
        )


def derive_engine_arguments(config: ServeConfig, checkpoint: Checkpoint, device: Device) -> dict[str, Any]:
    """vLLM's engine arguments by name, from the flags, the manifest and config.json.

    Raises ConfigError for a flag that this device or this model cannot follow.
    """
    if device == "cpu" and checkpoint.latent and config.kv_cache_dtype == "fp8":
        raise ConfigError(
            "--kv-cache-dtype fp8: the CPU engine caches latent attention in the model's dtype only; leave it out"
        )
    if device == "cpu" and config.pipeline_parallel_size > 1 and config.enforce_eager:
        raise ConfigError(
            "--pipeline-parallel-size with --enforce-eager: this engine then fails at the first request on a CPU; "
            "leave one of them out"
        )
    kv_bytes = _kv_cache_bytes(config, device)
    arguments: dict[str, Any] = {
        "model": str(checkpoint.directory),
        "served_model_name": [config.served_model_name or checkpoint.name],
        "dtype": checkpoint.shape.dtype if checkpoint.shape.dtype in ENGINE_DTYPES else "auto",
        "kv_cache_dtype": _kv_cache_dtype(config, checkpoint),
        "max_model_len": _max_model_len(config, checkpoint, kv_bytes),
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "enforce_eager": config.enforce_eager,
        "max_num_queued_reqs": config.max_num_queued_reqs,
        "allowed_origins": [],  # ours stands before the gateway
        "shutdown_timeout": config.drain_timeout_s,
        "load_format": "safetensors",  # never a pickle
        "trust_remote_code": config.trust_remote_code,
    }
    optional = {
        "kv_cache_memory_bytes": kv_bytes,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "max_num_seqs": config.max_num_seqs,
        "max_num_queued_tokens": config.max_num_queued_tokens,
        "tool_call_parser": config.tool_call_parser,
        "enable_auto_tool_choice": True if config.tool_call_parser else None,
        "reasoning_parser": config.reasoning_parser,
        "otlp_traces_endpoint": config.otlp_traces_endpoint,
        "override_generation_config": config.max_output_tokens
        and {"max_new_tokens": config.max_output_tokens},  # also for a request that does not say
    } | _lora_arguments(config)
    given = {name: value for name, value in optional.items() if value is not None}
    return arguments | given | _node_arguments(config)


def _node_arguments(config: ServeConfig) -> dict[str, Any]:
    """Several nodes run on vLLM's own processes: Ray would be one more thing to install and to watch."""
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
    """The number format that keys and values will be stored in: fp8, or the model's own."""
    if config.kv_cache_dtype != "auto":
        return config.kv_cache_dtype
    if not checkpoint.latent and (checkpoint.declares_fp8_kv or checkpoint.measured_with_fp8_kv):
        return "fp8"
    dtype = checkpoint.shape.dtype
    return dtype if dtype in ENGINE_DTYPES else "bfloat16"


def _kv_cache_dtype(config: ServeConfig, checkpoint: Checkpoint) -> str:
    # AutoAWQ's and AutoGPTQ's formats have no place for a KV scheme: ask for what the manifest says.
    if config.kv_cache_dtype == "auto" and not checkpoint.declares_fp8_kv:
        return "fp8" if effective_kv_dtype(config, checkpoint) == "fp8" else "auto"
    return config.kv_cache_dtype


def _kv_cache_bytes(config: ServeConfig, device: Device) -> int | None:
    if device == "cpu" and config.gpu_memory_utilization is not None:
        raise ConfigError(
            "--gpu-memory-utilization is for GPUs and this engine runs on the CPU; give --kv-cache-gib"
        )
    if config.kv_cache_memory_bytes is None and device == "cpu":
        return DEFAULT_CPU_KV_CACHE_BYTES
    return config.kv_cache_memory_bytes


def _max_model_len(config: ServeConfig, checkpoint: Checkpoint, kv_bytes: int | None) -> int | None:
    """None leaves it to the engine, which reads the same config.json; -1 asks it to fit the GPU's memory."""
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
    # One block stays back as the engine's null block.
    blocks = kv_bytes // (per_token * KV_BLOCK_TOKENS) - 1
    if blocks < 1:
        raise ConfigError(
            f"{kv_bytes / GIB:.3f} GiB of KV cache do not hold {KV_BLOCK_TOKENS} tokens of "
            f"{per_token} bytes each; raise --kv-cache-gib"
        )
    return blocks * KV_BLOCK_TOKENS


def _kv_bytes_per_token_and_device(config: ServeConfig, checkpoint: Checkpoint) -> int:
    """Of a token, what the fullest device caches: its stage's layers, and its part of the KV heads.

    More devices than KV heads hold copies; a latent is never split.
    """
    shape = checkpoint.shape
    all_layers = shape.kv_bytes_per_token(effective_kv_dtype(config, checkpoint))
    parts = 1 if checkpoint.latent else min(config.tensor_parallel_size, shape.kv_heads)
    stage_layers = math.ceil(shape.layers / config.pipeline_parallel_size)
    return stage_layers * math.ceil(all_layers // shape.layers / parts)
