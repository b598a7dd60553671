"""What `lowbit serve` is asked to do: one table of its flags, their environment variables and their defaults."""

# ruff: noqa: RUF009  # `flag` is dataclasses.field

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from lowbit_core.cli import file_path
from lowbit_core.errors import ConfigError
from lowbit_server.flags import (
    between,
    flag,
    fraction,
    gib,
    model_names,
    named_paths,
    one_of,
    origins,
    price,
    proxies,
    server_url,
    url_prefix,
)

Device = Literal["cpu", "gpu"]
KVDtype = Literal["auto", "fp8", "bfloat16"]
KV_DTYPES: tuple[str, ...] = get_args(KVDtype)
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what the engine has kernels for

_model, _engine, _nodes = partial(flag, "model"), partial(flag, "engine"), partial(flag, "several nodes")
_limit, _http = partial(flag, "limits"), partial(flag, "HTTP and operation")
_cost, _shadow = partial(flag, "cost"), partial(flag, "quality in production")
_port, _tokens = between(1, 65535), between(1, 1 << 30)


@dataclass(frozen=True)
class ServeConfig:
    """The flags of `lowbit serve`, each checked; None means that the value is derived."""

    directory: Path

    served_model_name: tuple[str, ...] = _model(
        "name in the API, several by comma: the first stands in answers and metrics (default: the base model's name)",
        model_names, (),
    )  # fmt: skip
    max_model_len: int | None = _model("context length (default: the model's, if it fits)", _tokens)
    tool_call_parser: str | None = _model("how the model writes tool calls (hermes, llama3_json, …)", str)
    reasoning_parser: str | None = _model("how the model marks its reasoning (qwen3, deepseek_r1, …)", str)
    strict_tools: str = _model(
        "what binds the model when it calls tools: auto (a tool's own `strict`), function (the form of the call, "
        "always), parameter (every tool's schema too)", one_of("auto", "function", "parameter"), "auto",
    )  # fmt: skip
    json_whitespace: str = _model(
        "whitespace in answers that a JSON schema binds, not in calls of tools: any, or none (small models may write "
        "it without end)",
        one_of("any", "none"), "any",
    )  # fmt: skip
    lora_modules: tuple[tuple[str, Path], ...] = _model(
        "LoRA adapters to load at the start: NAME=DIR, several by comma", named_paths, ()
    )
    lora_dir: Path | None = _model(
        "directory of LoRA adapters, each loaded when a request names it as its model", file_path
    )
    max_loras: int = _model("most adapters in one batch", between(1, 1024), 4)
    max_lora_rank: int = _model("largest rank of an adapter", one_of(*LORA_RANKS), 16)
    allow_rejected: bool = _model("serve a checkpoint that its quality gate rejected")
    skip_hash_check: bool = _model("check names and sizes of the checkpoint's files, not their SHA-256")
    trust_remote_code: bool = _model("run Python code that the checkpoint directory contains")

    kv_cache_memory_bytes: int | None = _engine(
        "the same in bytes", between(1, 1 << 50),
        kv_cache_gib=("GiB of KV cache on each device (default: 2 on the CPU, derived on a GPU)", gib),
    )  # fmt: skip
    kv_cache_dtype: KVDtype = _engine(
        "auto (what the checkpoint says), fp8, bfloat16", one_of(*KV_DTYPES), "auto"
    )
    gpu_memory_utilization: float | None = _engine(
        "share of each GPU's memory (default: the engine's)", fraction
    )
    tensor_parallel_size: int = _engine("devices that share the weights", between(1, 64), 1)
    max_num_seqs: int | None = _engine(
        "most sequences in one batch (default: the engine's)", between(1, 65536)
    )
    enforce_eager: bool = _engine("skip torch.compile: starts sooner, runs slower")

    pipeline_parallel_size: int = _nodes(
        "groups of devices that each hold a part of the layers", between(1, 64), 1
    )
    nnodes: int = _nodes("machines that hold one model together", between(1, 64), 1)
    node_rank: int = _nodes("which of them this is; 0 leads and answers requests", between(0, 63), 0)
    master_addr: str = _nodes("address at which the others reach node 0", str, "127.0.0.1")
    master_port: int = _nodes("a free port of node 0 where all nodes meet", _port, 29501)

    api_keys: Path | None = _limit(
        "file of named API keys and their limits (`lowbit key` makes entries)", file_path
    )
    max_num_queued_reqs: int = _limit(
        "most requests at once, running or waiting; more are answered 429", between(1, 1 << 20), 1024
    )
    max_num_queued_tokens: int | None = _limit(
        "most prompt tokens that wait to be read (default: no limit)", _tokens
    )
    request_timeout_s: int | None = _limit(
        "longest time for a request; a client may ask for less with x-request-timeout (default: no limit)",
        between(1, 86400),
    )
    max_header_bytes: int = _limit("largest request head", between(1024, 1 << 20), 64 << 10)
    max_body_bytes: int = _limit("largest request body", between(1024, 1 << 30), 32 << 20)
    max_prompt_characters: int | None = _limit("longest text of a prompt (default: no limit)", _tokens)
    max_output_tokens: int | None = _limit(
        "largest max_tokens of a request (default: the context length)", _tokens
    )

    usage_file: Path | None = _cost(
        "file that counts each key's tokens by month, over restarts (`lowbit usage` reads it)", file_path
    )
    price_per_hour: float | None = _cost(
        "what an hour of all that serves costs, for lowbit_cost_per_million_tokens", price
    )

    shadow: str | None = _shadow(
        "endpoint of the base model that scores a share of the answers again, when this server is idle: their token "
        "ids are sent there (default: none)", server_url,
    )  # fmt: skip
    shadow_share: float = _shadow("share of the requests", fraction, 0.001)
    shadow_key_file: Path | None = _shadow("file with the base endpoint's API key", file_path)
    shadow_max_tokens: int = _shadow(
        "an answer is scored up to here, its prompt included: log-probabilities of so many tokens at once need memory",
        between(2, 1 << 20), 1024,
    )  # fmt: skip

    host: str = _http("address to listen on", str, "127.0.0.1")
    port: int = _http("port to listen on", _port, 8000)
    uds: Path | None = _http("Unix socket to listen on, in place of --host and --port", Path)
    root_path: str = _http(
        "prefix that a proxy puts before every path (/llm), stripped or not", url_prefix, ""
    )
    forwarded_allow_ips: tuple[str, ...] = _http(
        "proxies whose X-Forwarded-For and -Proto are believed: addresses, networks (10.0.0.0/8), or unix for "
        "whoever reaches --uds; by comma (default: none)", proxies, ()
    )  # fmt: skip
    admin_port: int | None = _http(
        "own port for /metrics and admin, without keys (default: on --port)", _port
    )
    cors_origins: tuple[str, ...] = _http(
        "origins that browsers may call from, by comma (default: none)", origins, ()
    )
    ssl_certfile: Path | None = _http("certificate for HTTPS, with --ssl-keyfile", file_path)
    ssl_keyfile: Path | None = _http("private key for HTTPS", file_path)
    drain_timeout_s: int = _http("longest wait at SIGTERM for running requests", between(0, 3600), 30)
    otlp_traces_endpoint: str | None = _http("OpenTelemetry collector to send traces to (default: none)", str)
    no_request_log: bool = _http("do not write a line for each request")
    no_page: bool = _http("no page at / and nothing that only it asks for")

    aliases: tuple[tuple[tuple[str, str], str], ...] = ()  # (method, path) that a cloud asks for, and ours


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


def base_url(config: ServeConfig) -> str:
    """Where clients reach the API, or the Unix socket on which it listens."""
    if config.uds is not None:
        return f"unix:{config.uds}"
    scheme = "https" if config.ssl_certfile else "http"
    return f"{scheme}://{address(config.host, config.port)}{config.root_path}/v1"
