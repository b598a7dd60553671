"""What `lowbit serve` is asked to do: its flags, checked, as one object."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lowbit_core.errors import ConfigError

Device = Literal["cpu", "gpu"]
KVDtype = Literal["auto", "fp8", "bfloat16"]
KV_DTYPES: tuple[str, ...] = get_args(KVDtype)
GIB = 1 << 30


@dataclass(frozen=True)
class ServeConfig:
    """The flags of `lowbit serve`, each checked; None means that the value is derived."""

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


def refuse_uneven_nodes(config: ServeConfig) -> None:
    """Raise ConfigError where the devices do not divide evenly among the nodes, or `node_rank` is out of range."""
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


def address(host: str, port: int) -> str:
    """`host:port` as it stands in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
