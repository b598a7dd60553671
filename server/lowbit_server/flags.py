"""The flags of `lowbit serve` by group, and how the text of each becomes a value.

Each flag `--some-flag` may also come from `LOWBIT_SOME_FLAG`; the flag wins.
"""

import argparse
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lowbit_core.errors import ConfigError
from lowbit_server.config import GIB, KV_DTYPES, ServeConfig

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what the engine has kernels for
TRUE, FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


@dataclass(frozen=True)
class Flag:
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
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            _add(group, flag, environment)


def _add(group: argparse._ArgumentGroup, flag: Flag, environment: Mapping[str, str]) -> None:
    if flag.parse is None:
        group.add_argument(
            flag.name, action="store_true", default=_switched_on(flag.name, environment), help=flag.help
        )
        return
    given = environment.get(variable(flag.name), flag.default)
    if str(given).startswith("tcp://"):  # Kubernetes' own LOWBIT_PORT, for a Service named "lowbit"
        given = flag.default
    group.add_argument(flag.name, type=_named(flag.name, flag.parse), default=given, help=flag.help)


def variable(flag: str) -> str:
    return "LOWBIT_" + flag.removeprefix("--").replace("-", "_").upper()


def _switched_on(flag: str, environment: Mapping[str, str]) -> bool:
    text = environment.get(variable(flag), "").lower()
    if text not in TRUE + FALSE:
        raise ConfigError(f"{variable(flag)}={text}: give 1 or 0")
    return text in TRUE


def _named(flag: str, parse: Callable[[str], object]) -> Callable[[str], object]:
    """Turn a ValueError of `parse` into one line that names the flag."""

    def convert(text: str) -> object:
        try:
            return parse(text)
        except ValueError as error:
            raise ConfigError(f"{flag} (or {variable(flag)}) is {text!r}; it must be {error}") from None

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


def _adapters(text: str) -> tuple[tuple[str, Path], ...]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    if not pairs or not all(name and path for name, _, path in pairs):
        raise ValueError("NAME=DIR, several by comma")
    return tuple((name, Path(path)) for name, _, path in pairs)


def _rank(text: str) -> int:
    if text not in map(str, LORA_RANKS):
        raise ValueError(f"one of {', '.join(map(str, LORA_RANKS))}")
    return int(text)


_PORT, _TOKENS, _SECONDS = _between(1, 65535), _between(1, 1 << 30), _between(0, 3600)

GROUPS: dict[str, tuple[Flag, ...]] = {
    "model": (
        Flag("--served-model-name", str, "name in the API (default: the base model's name)"),
        Flag("--max-model-len", _TOKENS, "context length (default: the model's, if it fits)"),
        Flag(
            "--tool-call-parser", str, "how the model writes tool calls, for `tools` (hermes, llama3_json, …)"
        ),
        Flag("--reasoning-parser", str, "how the model marks its reasoning (qwen3, deepseek_r1, …)"),
        Flag("--lora-modules", _adapters, "LoRA adapters to load at the start: NAME=DIR, several by comma"),
        Flag(
            "--lora-dir",
            Path,
            "directory whose LoRA adapters are loaded when a request names one as its model",
        ),
        Flag("--max-loras", _between(1, 1024), "most adapters in one batch (default: %(default)s)"),
        Flag("--max-lora-rank", _rank, "largest rank of an adapter (default: %(default)s)"),
        Flag("--allow-rejected", None, "serve a checkpoint that its quality gate rejected"),
        Flag("--skip-hash-check", None, "check names and sizes of the checkpoint's files, not their SHA-256"),
        Flag("--trust-remote-code", None, "run Python code that the checkpoint directory contains"),
    ),
    "engine": (
        Flag(
            "--kv-cache-gib", _gib, "GiB of KV cache on each device (default: 2 on the CPU, derived on a GPU)"
        ),
        Flag("--kv-cache-memory-bytes", _between(1, 1 << 50), "the same in bytes"),
        Flag("--kv-cache-dtype", _one_of(KV_DTYPES), "auto (what the checkpoint says), fp8, bfloat16"),
        Flag("--gpu-memory-utilization", _fraction, "share of each GPU's memory (default: the engine's)"),
        Flag(
            "--tensor-parallel-size", _between(1, 64), "devices that share the weights (default: %(default)s)"
        ),
        Flag("--max-num-seqs", _between(1, 65536), "most sequences in one batch (default: the engine's)"),
        Flag("--enforce-eager", None, "skip torch.compile: starts sooner, runs slower"),
    ),
    "several nodes": (
        Flag(
            "--pipeline-parallel-size",
            _between(1, 64),
            "groups of devices that hold one part of the layers each (default: %(default)s)",
        ),
        Flag("--nnodes", _between(1, 64), "machines that hold one model together (default: %(default)s)"),
        Flag(
            "--node-rank",
            _between(0, 63),
            "which of them this is; 0 leads and answers requests (default: %(default)s)",
        ),
        Flag("--master-addr", str, "where the others reach node 0 (default: %(default)s)"),
        Flag("--master-port", _PORT, "a free port of node 0 where all nodes meet (default: %(default)s)"),
    ),
    "limits": (
        Flag("--api-keys", Path, "file of named API keys and their limits (`lowbit key` makes entries)"),
        Flag(
            "--max-num-queued-reqs",
            _between(1, 1 << 20),
            "most requests at once, running or waiting; more are answered 429 (default: %(default)s)",
        ),
        Flag(
            "--max-num-queued-tokens", _TOKENS, "most prompt tokens that wait to be read (default: no limit)"
        ),
        Flag(
            "--request-timeout-s",
            _between(1, 86400),
            "longest time for a request; a client may ask for less with x-request-timeout (default: no limit)",
        ),
        Flag("--max-header-bytes", _between(1024, 1 << 20), "largest request head (default: %(default)s)"),
        Flag("--max-body-bytes", _between(1024, 1 << 30), "largest request body (default: %(default)s)"),
        Flag("--max-prompt-characters", _TOKENS, "longest text of a prompt (default: no limit)"),
        Flag("--max-output-tokens", _TOKENS, "largest max_tokens of a request (default: the context length)"),
    ),
    "HTTP and operation": (
        Flag("--host", str, "address to listen on (default: %(default)s)"),
        Flag("--port", _PORT, "port to listen on (default: %(default)s)"),
        Flag("--admin-port", _PORT, "own port for /metrics and admin, without keys (default: on --port)"),
        Flag("--cors-origins", str, "origins that browsers may call from, by comma (default: none)"),
        Flag("--ssl-certfile", Path, "certificate for HTTPS, with --ssl-keyfile"),
        Flag("--ssl-keyfile", Path, "private key for HTTPS"),
        Flag("--drain-timeout-s", _SECONDS, "longest wait at SIGTERM for what runs (default: %(default)s)"),
        Flag("--otlp-traces-endpoint", str, "OpenTelemetry collector to send traces to (default: none)"),
        Flag("--no-request-log", None, "do not write a line for each request"),
    ),
}
