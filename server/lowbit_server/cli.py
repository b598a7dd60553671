"""`lowbit serve DIR`: flags and environment variables become one checked ServeConfig.

Nothing of vLLM or torch is imported before the checkpoint has been checked.
"""

import argparse
import contextlib
import os
import pwd
import socket
import sys
import tempfile
from collections.abc import Mapping, MutableMapping
from dataclasses import fields, replace
from pathlib import Path

from lowbit_core.cli import Command, file_path
from lowbit_core.errors import ConfigError, EngineError
from lowbit_core.log import get_logger
from lowbit_server.checkpoint import Checkpoint, open_checkpoint
from lowbit_server.cloud_storage import download
from lowbit_server.clouds import Cloud, checkpoint_in, cloud_of, with_cloud
from lowbit_server.config import ServeConfig, base_url, refuse_uneven_nodes
from lowbit_server.flags import add_arguments
from lowbit_server.http.certificates import open_certificate
from lowbit_server.http.listeners import listen, listener_of
from lowbit_server.lifecycle import INTERRUPTED, StoppedWhileLoadingError, leaving_at_once_on_signals
from lowbit_server.shadow.key_file import read_key

log = get_logger("serve")


def add_serve_arguments(parser: argparse.ArgumentParser, environment: Mapping[str, str] = os.environ) -> None:
    """Declare the directory and the flags of ServeConfig, whose defaults a cloud's environment may set."""
    cloud = cloud_of(environment)
    parser.set_defaults(cloud=cloud, aliases=tuple(cloud.aliases.items()) if cloud else ())
    parser.add_argument(
        "directory", metavar="DIR", type=file_path, nargs="?", default=environment.get("LOWBIT_DIR"),
        help="checkpoint directory that `lowbit quantize` wrote, or any Hugging Face model directory",
    )  # fmt: skip
    add_arguments(parser, ServeConfig, with_cloud(environment, cloud))


def config_from(arguments: argparse.Namespace) -> ServeConfig:
    """The flags as one checked object; raises ConfigError for flags that contradict each other."""
    if arguments.directory is None and not (arguments.cloud and arguments.cloud.model):
        raise ConfigError("give the checkpoint directory: lowbit serve DIR (or LOWBIT_DIR)")
    if arguments.kv_cache_gib is not None:
        if arguments.kv_cache_memory_bytes is not None:
            raise ConfigError(
                "--kv-cache-gib and --kv-cache-memory-bytes say the same thing; give one of them"
            )
        arguments.kv_cache_memory_bytes = arguments.kv_cache_gib
    if (arguments.ssl_certfile is None) != (arguments.ssl_keyfile is None):
        raise ConfigError("--ssl-certfile and --ssl-keyfile belong together; give both or neither")
    if arguments.shadow_key_file is not None and arguments.shadow is None:
        raise ConfigError("--shadow-key-file is for the endpoint that --shadow names; give both or neither")
    config = ServeConfig(**{field.name: getattr(arguments, field.name) for field in fields(ServeConfig)})
    refuse_uneven_nodes(config)
    return config


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal; 0 after a clean stop, 130 for one before the server was ready."""
    config = config_from(arguments)
    if config.ssl_certfile is not None and config.ssl_keyfile is not None:
        open_certificate(config.ssl_certfile, config.ssl_keyfile)
    if config.shadow_key_file is not None:
        read_key(config.shadow_key_file)
    with leaving_at_once_on_signals(), contextlib.ExitStack() as stack:
        held = None
        if arguments.cloud is not None:
            held = stack.enter_context(listener_of(config))
            listen(held)  # clouds restart a container whose port refuses connections while files are read
            log.info(
                "%s: %s; listening at %s", arguments.cloud.told_by, arguments.cloud.name, base_url(config)
            )
            directory = arguments.directory or _clouds_checkpoint(arguments.cloud)
            config = replace(config, directory=directory)
        log.info("checking the files of %s", config.directory)
        checkpoint = open_checkpoint(config)
        if checkpoint.manifest is None:
            log.warning("%s has no manifest: how close it is to its base model is unknown", config.directory)
        elif not checkpoint.manifest.gate.accepted:
            log.warning("serving a checkpoint that its quality gate rejected, as --allow-rejected asks")
        prepare_environment(arguments.log_level)
        if config.lora_dir is not None:
            os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"  # vLLM's own routes for that stay closed
        _serve(config, checkpoint, held)
    return 0


def _clouds_checkpoint(cloud: Cloud) -> Path:
    local = download(cloud.model) if "://" in cloud.model else file_path(cloud.model)
    return checkpoint_in(cloud, local)


def _serve(config: ServeConfig, checkpoint: Checkpoint, held: socket.socket | None) -> None:
    try:
        import uvloop  # as vLLM's own server: cheaper for many streams

        from lowbit_server import app  # vLLM: only now, see the module docstring
        from lowbit_server.engine import follower, vllm_engine  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("lowbit_"):
            raise
        raise EngineError(
            f"{error.name} is not installed; pip install 'lowbit[cpu]' (no GPU) or 'lowbit[gpu]' (CUDA)"
        ) from error
    try:
        uvloop.run(
            follower.follow(config, checkpoint) if config.node_rank else app.serve(config, checkpoint, held)
        )
    except StoppedWhileLoadingError:
        sys.stderr.write("lowbit: interrupted\n")
        sys.stderr.flush()
        os._exit(INTERRUPTED)  # the engine's constructor may still run; Python's own end would wait for it


def prepare_environment(
    log_level: str, environment: MutableMapping[str, str] = os.environ, uid: int | None = None
) -> None:
    """Set what vLLM reads from the environment at import, where the user has not: offline, no telemetry, few log lines.

    `VLLM_CPU_INT4_W4A8` too: on CPUs with AMX vLLM's 4-bit linears quantize activations to 8 bits by default, and the
    checkpoint's quality was measured without that.
    """
    defaults = {
        "HF_HUB_OFFLINE": "1",  # the checkpoint is a directory; nothing is to be downloaded
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_INT4_W4A8": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # as vLLM's own server: this process has threads
        "VLLM_LOGGING_LEVEL": "DEBUG" if log_level == "DEBUG" else "WARNING",
    }
    if "HOME" not in environment and not _has_home(os.getuid() if uid is None else uid):
        defaults["HOME"] = tempfile.mkdtemp(prefix="lowbit-home-")  # else a directory called ~ is made here
        defaults["USER"] = "lowbit"
        log.info("this user has no home directory: caches go to %s", defaults["HOME"])
    for name, setting in defaults.items():
        environment.setdefault(name, setting)
    if environment["VLLM_CPU_INT4_W4A8"] != "0":
        log.warning(
            "VLLM_CPU_INT4_W4A8 is set: on a CPU with AMX, 4-bit linears quantize activations to 8 bits, "
            "which was not measured"
        )


def _has_home(uid: int) -> bool:
    try:
        return bool(pwd.getpwuid(uid).pw_dir)
    except KeyError:
        return False


command = Command(
    help="serve a checkpoint on vLLM behind an OpenAI-compatible endpoint",
    add_arguments=add_serve_arguments,
    run=run,
)
