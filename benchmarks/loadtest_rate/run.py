"""How many token events a second the load generator takes before its own lag shows.

    python benchmarks/loadtest_rate/run.py --streams 64 128 256 400 --rate 20 --workers 1

Each line starts the tests' timed stand-in (one process) and streams from it, all streams open at once. Lag is the
generator's own: its event loops against a heartbeat, its sends against the schedule. The last line on stdout is JSON.
Run it on an otherwise idle machine: the load average is in each line because it decides what the numbers mean.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.loadtest.fake_openai import Reply, settings_of  # noqa: E402

from lowbit_loadtest.generate.driver import Share, Target  # noqa: E402
from lowbit_loadtest.generate.schedule import Job, Schedule, Turn  # noqa: E402
from lowbit_loadtest.generate.workers import run_workers, shares_of  # noqa: E402
from lowbit_loadtest.report.summary import Run, lag  # noqa: E402

RAMP_S = 2.0  # streams open over this time


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 128, 256, 400])
    parser.add_argument("--rate", type=float, default=20.0, help="tokens/s of each stream")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each stream")
    arguments = parser.parse_args()
    rows = []
    for streams in arguments.streams:
        rows.append(measure(streams, arguments.rate, arguments.workers, arguments.seconds))
        print(json.dumps(rows[-1]), file=sys.stderr)
    print(json.dumps({"cpus": os.cpu_count(), "machine": platform.machine(), "rows": rows}))


def measure(streams: int, rate: float, workers: int, seconds: float) -> dict[str, float]:
    """One run; lags in milliseconds."""
    chunks = int(seconds * rate)
    stand_in = ROOT / "tests/loadtest/fake_openai.py"
    command = [
        sys.executable,
        str(stand_in),
        settings_of([Reply(ttft_s=0.05, gap_s=1 / rate, chunks=chunks)]),
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    target = Target(f"http://127.0.0.1:{server.stdout.readline().strip()}", "fake-model")
    turn = Turn(({"role": "user", "content": "hello"},), chunks)
    jobs = tuple(Job(index, RAMP_S * index / streams, (turn,), index) for index in range(streams))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        ran = run_workers(shares_of(Schedule(jobs), Share(target, ()), workers), lambda tally: None)
    finally:
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # the server is not waited for yet: workers only
        server.kill()
        server.communicate()
    records = ran.records
    seen = lag([Run(records, None, heartbeat_lags_s=ran.heartbeat_lags_s)])
    events = sum(len(record.chunk_times_s) for record in records)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "streams": streams,
        "events_per_s": streams * rate,
        "all_events_arrived": events == streams * chunks,
        "loop_lag_p99_ms": round(1000 * (seen.loop_p99 or 0), 2),
        "send_lag_p99_ms": round(1000 * (seen.send_p99 or 0), 2),
        "worker_cpu_us_per_event": round(1e6 * cpu_s / events, 1),
        "load_average": round(os.getloadavg()[0], 1),
    }


if __name__ == "__main__":
    main()
