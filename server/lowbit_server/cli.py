"""`lowbit serve DIR`: flags and environment variables become one checked ServeConfig.

Each flag `--some-flag` may also come from `LOWBIT_SOME_FLAG`; the flag wins. Nothing of vLLM or torch is
imported before the checkpoint has been checked.
"""

import argparse
import asyncio
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from lowbit_core.cli import Command
from lowbit_core.errors import ConfigError, EngineError
from lowbit_core.log import get_logger
from lowbit_server.config import GIB, KV_DTYPES, ServeConfig, open_checkpoint

log = get_logger("serve")

TRUE, FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


@dataclass(frozen=True)
class _Flag:
    """`--name VALUE`; the default is ServeConfig's unless one is given. `parse` None makes it a switch."""

    name: str
    parse: Callable[[str], object] | None
    help: str

    @property
    def default(self) -> object:
        return getattr(ServeConfig, self.name.removeprefix("--").replace("-", "_"), None)


def add_arguments(parser: argparse.ArgumentParser, environment: Mapping[str, str] = os.environ) -> None:
    """Declare the flags; their defaults come from the environment, then from ServeConfig."""
    parser.add_argument(
        "directory", metavar="DIR", type=Path, nargs="?", default=environment.get("LOWBIT_DIR"),
        help="checkpoint directory that `lowbit quantize` wrote, or any Hugging Face model directory",
    )  # fmt: skip
    for flag in _flags():
        if flag.parse is None:
            on = _switched_on(flag.name, environment)
            parser.add_argument(flag.name, action="store_true", default=on, help=flag.help)
            continue
        given = environment.get(_variable(flag.name), flag.default)
        if str(given).startswith("tcp://"):  # Kubernetes' own LOWBIT_PORT, for a Service named "lowbit"
            given = flag.default
        parser.add_argument(flag.name, type=_named(flag.name, flag.parse), default=given, help=flag.help)


def _flags() -> tuple[_Flag, ...]:
    tokens, seconds = _between(1, 1 << 30), _between(0, 3600)
    return (
        _Flag("--host", str, "address to listen on (default: %(default)s)"),
        _Flag("--port", _between(1, 65535), "port to listen on (default: %(default)s)"),
        _Flag("--served-model-name", str, "name in the API (default: the base model's name)"),
        _Flag("--max-model-len", tokens, "context length (default: the model's, if it fits)"),
        _Flag(
            "--kv-cache-gib", _gib, "GiB of KV cache on each device (default: 2 on the CPU, derived on a GPU)"
        ),
        _Flag("--kv-cache-memory-bytes", _between(1, 1 << 50), "the same in bytes"),
        _Flag("--kv-cache-dtype", _one_of(KV_DTYPES), "auto (what the checkpoint says), fp8, bfloat16"),
        _Flag(
            "--gpu-memory-utilization", _fraction, "share of each GPU's memory to use (default: the engine's)"
        ),
        _Flag(
            "--tensor-parallel-size", _between(1, 64), "devices that share the weights (default: %(default)s)"
        ),
        _Flag("--max-num-seqs", _between(1, 65536), "most sequences in one batch (default: the engine's)"),
        _Flag(
            "--max-num-queued-reqs",
            _between(1, 1 << 20),
            "most requests at once, running or waiting; more are answered 429 (default: %(default)s)",
        ),
        _Flag(
            "--max-num-queued-tokens", tokens, "most prompt tokens that wait to be read (default: no limit)"
        ),
        _Flag("--api-keys", Path, "file of named API keys and their limits (`lowbit key` makes entries)"),
        _Flag(
            "--request-timeout-s",
            _between(1, 86400),
            "longest time for a request; a client may ask for less with x-request-timeout (default: no limit)",
        ),
        _Flag("--max-body-bytes", _between(1024, 1 << 30), "largest request body (default: %(default)s)"),
        _Flag("--max-output-tokens", tokens, "largest max_tokens of a request (default: the context length)"),
        _Flag("--cors-origins", str, "origins that browsers may call from, by comma (default: none)"),
        _Flag("--ssl-certfile", Path, "certificate for HTTPS, with --ssl-keyfile"),
        _Flag("--ssl-keyfile", Path, "private key for HTTPS"),
        _Flag("--drain-timeout-s", seconds, "longest wait at SIGTERM for what runs (default: %(default)s)"),
        _Flag("--no-request-log", None, "do not write a line for each request"),
        _Flag("--enforce-eager", None, "skip torch.compile: starts sooner, runs slower"),
        _Flag("--allow-rejected", None, "serve a checkpoint that its quality gate rejected"),
        _Flag(
            "--skip-hash-check", None, "check names and sizes of the checkpoint's files, not their SHA-256"
        ),
    )


def config_from(arguments: argparse.Namespace) -> ServeConfig:
    """The checked flags as one object; raises ConfigError for flags that contradict each other."""
    if arguments.directory is None:
        raise ConfigError("give the checkpoint directory: lowbit serve DIR (or LOWBIT_DIR)")
    if arguments.kv_cache_gib is not None:
        if arguments.kv_cache_memory_bytes is not None:
            raise ConfigError(
                "--kv-cache-gib and --kv-cache-memory-bytes say the same thing; give one of them"
            )
        arguments.kv_cache_memory_bytes = arguments.kv_cache_gib
    if (arguments.ssl_certfile is None) != (arguments.ssl_keyfile is None):
        raise ConfigError("--ssl-certfile and --ssl-keyfile belong together; give both or neither")
    return ServeConfig(**{field.name: getattr(arguments, field.name) for field in fields(ServeConfig)})


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal; 0 after a clean stop."""
    config = config_from(arguments)
    log.info("checking the files of %s", config.directory)
    checkpoint = open_checkpoint(config)
    if checkpoint.manifest is None:
        log.warning("%s has no manifest: how close it is to its base model is unknown", config.directory)
    elif not checkpoint.manifest.gate.accepted:
        log.warning("serving a checkpoint that its quality gate rejected, as --allow-rejected asks")
    prepare_environment(arguments.log_level)
    try:
        from lowbit_server import app, engine  # noqa: F401  # vLLM: imported only now, see the module docstring
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("lowbit_"):
            raise
        raise EngineError(
            f"{error.name} is not installed; pip install 'lowbit[cpu]' (no GPU) or 'lowbit[gpu]' (CUDA)"
        ) from error
    asyncio.run(app.serve(config, checkpoint))
    return 0


def prepare_environment(log_level: str) -> None:
    """Set what vLLM reads when it is imported, where the user has not: offline, no telemetry, quiet."""
    defaults = {
        "HF_HUB_OFFLINE": "1",  # the checkpoint is a directory; nothing is to be downloaded
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "DEBUG" if log_level == "DEBUG" else "WARNING",
    }
    for name, setting in defaults.items():
        os.environ.setdefault(name, setting)


def _variable(flag: str) -> str:
    return "LOWBIT_" + flag.removeprefix("--").replace("-", "_").upper()


def _switched_on(flag: str, environment: Mapping[str, str]) -> bool:
    text = environment.get(_variable(flag), "").lower()
    if text not in TRUE + FALSE:
        raise ConfigError(f"{_variable(flag)}={text}: give 1 or 0")
    return text in TRUE


def _named(flag: str, parse: Callable[[str], object]) -> Callable[[str], object]:
    """Turn a ValueError of `parse` into one line that names the flag."""

    def convert(text: str) -> object:
        try:
            return parse(text)
        except ValueError as error:
            raise ConfigError(f"{flag} (or {_variable(flag)}) is {text!r}; it must be {error}") from None

    return convert


def _between(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(text)

    return parse


def _gib(text: str) -> int:
    number = _float(text)
    if not 0 < number <= 1 << 20:
        raise ValueError("a number of GiB above 0")
    return int(number * GIB)


def _fraction(text: str) -> float:
    number = _float(text)
    if not 0 < number <= 1:
        raise ValueError("a number above 0 and at most 1")
    return number


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # fails the caller's range check, which knows what to say


def _one_of(choices: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return text

    return parse


command = Command(
    help="serve a checkpoint on vLLM behind an OpenAI-compatible endpoint",
    add_arguments=add_arguments,
    run=run,
)
