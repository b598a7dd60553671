"""Starts the ranks of a run on this machine, and ends all of them when one has died.

The first rank's output is the command's; what another says is shown only if it was the first to fail.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from lowbit_core.server_process import describe_status, free_port

POLL_S = 0.2
GRACE_S = 20.0  # for a rank to notice that another has died, and to say so
LOST = 75  # status of a rank that ends because another has
LAUNCHED = "LOWBIT_RANK_LAUNCHED"  # tells a rank that somebody says why the run ended
LAUNCHER = "LOWBIT_LAUNCHER"  # a pipe that is at its end when the launcher is gone, however it went
HOME = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", LAUNCHED: "1"}
ERROR = "lowbit: error: "
KEPT = "what was finished is kept: run the same command again, with any number of ranks"


def launch(command: str, arguments: Sequence[str], count: int) -> int:
    """`lowbit COMMAND` with these flags as `count` ranks; returns the exit status."""
    port, cores = free_port(), len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // count)))
    shared = {"WORLD_SIZE": str(count), "MASTER_PORT": str(port), "OMP_NUM_THREADS": threads}
    alive, held = os.pipe()  # nothing is ever written: it ends with this process
    shared[LAUNCHER] = str(alive)
    with tempfile.TemporaryDirectory(prefix="lowbit-ranks-") as folder:
        logs = [Path(folder) / f"rank-{rank}.log" for rank in range(count)]
        ranks = [
            _start(
                [command, *arguments],
                {**HOME, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                logs[rank],
            )
            for rank in range(count)
        ]
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            if not _one_fails(ranks):
                return 0
            _end(ranks, GRACE_S)
        finally:
            _end(ranks, 0.0)
            signal.signal(signal.SIGTERM, before)
            os.close(alive)
            os.close(held)
        return _told(ranks, logs)


def _start(arguments: Sequence[str], environment: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "lowbit_core", *arguments]
    everything = os.environ | environment
    kept = [int(environment[LAUNCHER])]
    if environment["RANK"] == "0":
        return subprocess.Popen(command, env=everything, pass_fds=kept)
    with log.open("wb") as output:
        return subprocess.Popen(
            command, env=everything, pass_fds=kept, stdout=subprocess.DEVNULL, stderr=output
        )


def end_with_launcher() -> None:
    """Let this rank end when whoever started it is gone, killed perhaps: nobody else would end it."""
    if LAUNCHER not in os.environ:
        return

    def watch() -> None:
        os.read(int(os.environ[LAUNCHER]), 1)
        os._exit(LOST)

    threading.Thread(target=watch, daemon=True).start()


def _one_fails(ranks: Sequence["subprocess.Popen[bytes]"]) -> bool:
    """Wait until all have ended well, or one has not."""
    while True:
        statuses = [one.poll() for one in ranks]
        if any(statuses) or all(status == 0 for status in statuses):
            return any(statuses)
        time.sleep(POLL_S)


def _told(ranks: Sequence["subprocess.Popen[bytes]"], logs: Sequence[Path]) -> int:
    """Say in one line who failed and why, where the first rank has not said it itself; the exit status."""
    statuses = [one.returncode for one in ranks]
    if statuses[0] > 0 and statuses[0] != LOST:
        return statuses[0]
    failed = next((rank for rank, status in enumerate(statuses) if status not in (0, LOST)), 0)
    sys.stderr.write(f"{ERROR}rank {failed} {_last_words(statuses[failed], logs[failed])}\n")
    return statuses[failed] if 0 < statuses[failed] != LOST else 1


def _end(ranks: Sequence["subprocess.Popen[bytes]"], grace_s: float) -> None:
    """Wait for all; those that have not ended by themselves in time are ended."""
    until = time.monotonic() + grace_s
    for one in ranks:
        try:
            one.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.kill()
            one.wait()


def _last_words(status: int, log: Path) -> str:
    """Why a rank failed."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    said = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
    if said:
        return said[-1]
    last = next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")
    return f"ended {describe_status(status)}{last if status > 0 else ''}; {KEPT}"
