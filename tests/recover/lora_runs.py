"""`lowbit lora` as the command runs it, in this process or in one that is killed; and what it is trained on here."""

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lowbit_core.cli import Parser
from lowbit_core.errors import LowbitError
from lowbit_recover.lora_cli import command

SMALL = ("--rank", "4", "--epochs", "4", "--rate", "0.01", "--max-seq-length", "128", "--batch-size", "4")
ALONE = "import sys; from tests.recover.lora_runs import main; sys.exit(main(sys.argv[1:]))"


def lora(*arguments: str | Path) -> int:
    """Run it here."""
    parser = Parser(prog="lowbit lora")
    command.add_arguments(parser)
    return command.run(parser.read([str(one) for one in arguments]))


def main(arguments: list[str]) -> int:
    """As lowbit_core.cli does, for a process of its own."""
    try:
        return lora(*arguments)
    except LowbitError as error:
        sys.stderr.write(f"lowbit: error: {error}\n")
        return error.exit_status


def start(*arguments: str | Path, file_bytes: int | None = None) -> "subprocess.Popen[str]":
    """In a process of its own, whose files may grow to `file_bytes` only, as on a disk that is full."""

    def limited() -> None:
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    words = [sys.executable, "-c", ALONE, *map(str, arguments)]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limited
    )


def kill_when(process: "subprocess.Popen[str]", there: Path, seconds: float = 120.0) -> None:
    """SIGKILL once a file is there and has been written for the second time."""
    first: float | None = None
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        if there.exists():
            stamp = there.stat().st_mtime_ns
            first = stamp if first is None else first
            if stamp != first:
                process.send_signal(signal.SIGKILL)
                process.wait()
                return
        time.sleep(0.005)
    raise AssertionError(f"{there.name} was not written twice: {process.communicate()[1][-500:]}")


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Conversations with one right answer each, of which no two ask the same."""
    return [
        {
            "messages": [
                {"role": "system", "content": "Answer with the number after it."},
                {"role": "user", "content": f"number {number}"},
                {"role": "assistant", "content": f"{number + 1}!"},
            ]
        }
        for number in range(start, start + count)
    ]


def write_rows(path: Path, some: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return path
