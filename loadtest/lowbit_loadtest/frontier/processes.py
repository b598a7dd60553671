"""Runs `lowbit serve` and `lowbit quantize` as processes of their own, as a user would."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lowbit_core.errors import LowbitError
from lowbit_core.manifest import MANIFEST_NAME
from lowbit_core.server_process import free_port, last_words, start_server

LOWBIT = (sys.executable, "-c", "import sys; from lowbit_core.cli import main; sys.exit(main())")
MODEL = "checkpoint"


@dataclass(frozen=True)
class Served:
    url: str
    ready_s: float


def quantize(model: str, recipe: str, out: Path, log: Path) -> None:
    """Make a checkpoint, unless `out` holds one already."""
    if (out / MANIFEST_NAME).exists():
        return
    command = [*LOWBIT, "quantize", "--model", model, "--recipe", recipe, "--out", str(out)]
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status != 0:
        raise LowbitError(f"lowbit quantize of recipe {recipe} ended with status {status}: {last_words(log)}")


@contextmanager
def serving(directory: Path, flags: Sequence[str], log: Path, timeout_s: float) -> Iterator[Served]:
    """A server of `directory` on a free port until the block ends; EngineError if it does not become ready."""
    port = free_port()
    command = [*LOWBIT, "serve", str(directory), "--port", str(port), "--served-model-name", MODEL, *flags]
    server = start_server(command, f"http://127.0.0.1:{port}", log, name="lowbit serve")
    try:
        yield Served(server.url, server.wait_until_ready(timeout_s=timeout_s))
    finally:
        server.stop()
