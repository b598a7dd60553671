"""Stops at random moments of loading: does everything end, and how soon?

    python benchmarks/stops/run.py CHECKPOINT --work DIR --out benchmarks/stops/results/NAME.json

One start is timed to the end of loading. Then each of `--stops` starts gets SIGINT or SIGTERM, to its process or to its
whole group, at a seeded moment between its first instant and shortly after it is ready. Counted are the seconds until
the last process with this run's mark in its environment is gone. Exit status 1 when one took more than 10 s.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.endpoint import LOWBIT, write_result  # noqa: E402

from lowbit_core.server_process import ServerProcess, free_port, start_server  # noqa: E402

MARK = "LOWBIT_STOPS_RUN"
BOUND_S = 10.0
GIVE_UP_S = 60.0
AFTER_READY_S = 3.0
WAYS = [(number, group) for number in (signal.SIGINT, signal.SIGTERM) for group in (False, True)]


@dataclass(frozen=True)
class Stop:
    """`left`: processes still there after GIVE_UP_S, which were then killed."""

    moment_s: float
    signal: str
    to_group: bool
    processes: int
    gone_after_s: float
    status: int | None
    left: int
    shared_memory: int


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started this with `&`
    loading_s = seconds_to_load(arguments.checkpoint, arguments.work / "serve.log")
    moments = random.Random(arguments.seed)
    stops = []
    for number in range(arguments.stops):
        moment_s = moments.uniform(0, loading_s + AFTER_READY_S)
        signal_number, to_group = WAYS[number % len(WAYS)]
        stops.append(
            stop_at(moment_s, signal_number, to_group, arguments.checkpoint, arguments.work / f"{number}.log")
        )
        print(json.dumps(asdict(stops[-1])), flush=True)
    slowest = max(stop.gone_after_s for stop in stops)
    result = {
        "seed": arguments.seed, "loading_s": round(loading_s, 1), "bound_s": BOUND_S, "slowest_s": slowest,
        "statuses": Counter(str(stop.status) for stop in stops), "stops": [asdict(stop) for stop in stops],
    }  # fmt: skip
    write_result(arguments.out, result)
    return 0 if slowest <= BOUND_S and not any(stop.left for stop in stops) else 1


def start(checkpoint: Path, log: Path, run: str) -> ServerProcess:
    port = free_port()
    command = [
        str(LOWBIT), "serve", str(checkpoint), "--enforce-eager", "--kv-cache-gib", "1", "--port", str(port),
    ]  # fmt: skip
    return start_server(command, f"http://127.0.0.1:{port}", log, environment=os.environ | {MARK: run})


def seconds_to_load(checkpoint: Path, log: Path) -> float:
    server = start(checkpoint, log, "timed")
    try:
        return server.wait_until_ready()
    finally:
        server.stop()


def stop_at(moment_s: float, number: signal.Signals, to_group: bool, checkpoint: Path, log: Path) -> Stop:
    """Start, wait, send the signal, and count until nothing is left."""
    run = uuid.uuid4().hex
    shared = set(os.listdir("/dev/shm"))
    server = start(checkpoint, log, run)
    time.sleep(moment_s)
    processes = len(marked(run))
    began = time.monotonic()
    (os.killpg if to_group else os.kill)(server.process.pid, number)
    while marked(run) and time.monotonic() - began < GIVE_UP_S:
        server.process.poll()
        time.sleep(0.05)
    gone_after_s = time.monotonic() - began
    left = marked(run)
    for process in left:
        process.kill()
    try:
        status: int | None = server.process.wait(5)
    except subprocess.TimeoutExpired:
        status = None
    return Stop(
        round(moment_s, 2), number.name, to_group, processes, round(gone_after_s, 2), status, len(left),
        len(set(os.listdir("/dev/shm")) - shared),
    )  # fmt: skip


def marked(run: str) -> list[psutil.Process]:
    """The living processes of a run, whoever their parent is."""
    return [one for one in psutil.process_iter() if _mark(one) == run]


def _mark(process: psutil.Process) -> Any:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else process.environ().get(MARK)
    except psutil.Error:
        return None


if __name__ == "__main__":
    sys.exit(main())
