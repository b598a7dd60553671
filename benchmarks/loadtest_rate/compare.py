"""The highest rate of token events that Lowbit's generator and AIPerf take before their clocks run late.

    python benchmarks/loadtest_rate/compare.py --aiperf ENV/bin/aiperf --tokenizer DIR --json FILE

The tests' timed stand-in runs on one core, the generator, whichever it is, on another. The stand-in notes when it
wrote each chunk and both generators note when each chunk came, on the machine's one monotonic clock: a chunk's lag is
the difference. That is more than either says of itself, and the same measure for both. A rate counts when every event
arrived and the lag's p99 is below 5 ms; of several repetitions, in the median.
AIPerf 0.13.0 belongs into an environment of its own. All streams are open at once; AIPerf ramps them up as we do.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from tests.loadtest.fake_openai import Reply, settings_of  # noqa: E402

from lowbit_loadtest.generate.driver import Share, Target  # noqa: E402
from lowbit_loadtest.generate.schedule import Job, Schedule, Turn  # noqa: E402
from lowbit_loadtest.generate.workers import run_workers, shares_of  # noqa: E402

RAMP_S = 2.0
LIMIT_MS = 5.0
Arrivals = dict[int, list[float]]  # by stream: when its chunks came


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--aiperf", type=Path, help="its command; without it, only ours is measured")
    parser.add_argument("--tokenizer", type=Path, help="a model directory, for AIPerf")
    parser.add_argument("--streams", type=int, nargs="+", default=[128, 256, 384, 512])
    parser.add_argument("--aiperf-streams", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--rate", type=float, default=20.0, help="tokens/s of each stream")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--server-cpu", type=int, default=0)
    parser.add_argument("--generator-cpu", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = list(measure_all(arguments))
    names = sorted({row["generator"] for row in rows})
    document = {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "limit_ms": LIMIT_MS,
        "highest_events_per_s": {name: highest(rows, name) for name in names},
        "rows": rows,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document["highest_events_per_s"]))


def measure_all(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Both generators, in turn, repetition by repetition."""
    for repetition in range(arguments.repetitions):
        for streams in sorted({*arguments.streams, *arguments.aiperf_streams}):
            for name in ("lowbit", "aiperf"):
                wanted = arguments.streams if name == "lowbit" else arguments.aiperf_streams
                if streams in wanted and (name == "lowbit" or arguments.aiperf):
                    row = {"generator": name, "repetition": repetition, **measure(name, streams, arguments)}
                    print(json.dumps(row), file=sys.stderr, flush=True)
                    yield row


def measure(name: str, streams: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run of one generator."""
    chunks = int(arguments.seconds * arguments.rate)
    with stand_in(chunks, arguments.rate, arguments.server_cpu) as url:
        load_before = os.getloadavg()[0]
        if name == "lowbit":
            arrivals = ours(url, streams, chunks, arguments.generator_cpu)
        else:
            arrivals = aiperf(url, streams, chunks, arguments)
        with urllib.request.urlopen(f"{url}/written") as answer:
            written = {int(key): times for key, times in json.load(answer).items()}
    lags_ms = [
        1000 * (came - wrote)
        for key, times in written.items()
        for came, wrote in zip(arrivals.get(key, []), times, strict=False)
    ]
    gaps_ms = [1000 * gap for times in written.values() for gap in np.diff(times)]
    arrived = sum(map(len, arrivals.values()))
    return {
        "streams": streams,
        "events_per_s": streams * arguments.rate,
        "all_events_arrived": arrived == streams * chunks,
        "lag_p50_ms": round(float(np.percentile(lags_ms, 50)), 3) if lags_ms else None,
        "lag_p99_ms": round(float(np.percentile(lags_ms, 99)), 3) if lags_ms else None,
        "server_gap_p99_ms": round(float(np.percentile(gaps_ms, 99)), 2) if gaps_ms else None,
        "load_average_before": round(load_before, 1),
    }


@contextmanager
def stand_in(chunks: int, rate: float, cpu: int) -> Iterator[str]:
    """The tests' timed server, on its own core."""
    settings = settings_of([Reply(ttft_s=0.05, gap_s=1 / rate, chunks=chunks)])
    command = [sys.executable, str(ROOT / "tests/loadtest/fake_openai.py"), settings]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: os.sched_setaffinity(0, {cpu})
    )
    assert server.stdout is not None
    try:
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
    finally:
        server.kill()
        server.communicate()


def ours(url: str, streams: int, chunks: int, cpu: int) -> Arrivals:
    """One worker; it and its parent share the core."""
    turn = Turn(({"role": "user", "content": "hello"},), chunks)
    jobs = tuple(Job(index, RAMP_S * index / streams, (turn,), index) for index in range(streams))
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        ran = run_workers(
            shares_of(Schedule(jobs), Share(Target(url, "fake-model"), ()), 1), lambda tally: None
        )
    finally:
        os.sched_setaffinity(0, before)
    return {record.index: list(record.chunk_times_s) for record in ran.records}


def aiperf(url: str, streams: int, chunks: int, arguments: argparse.Namespace) -> Arrivals:
    """All of AIPerf's processes on the core; its chunk times are in its raw records."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_HUB", "TRANSFORMERS_"))
    }
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        prompts.write_text(
            "".join(json.dumps({"text": f"stream {index}"}) + "\n" for index in range(streams))
        )
        command = [
            str(arguments.aiperf), "profile", "--model", "fake-model", "--url", url, "--endpoint-type", "chat",
            "--streaming", "--tokenizer", str(arguments.tokenizer), "--input-file", str(prompts),
            "--custom-dataset-type", "single_turn", "--dataset-sampling-strategy", "sequential",
            "--concurrency", str(streams), "--concurrency-ramp-duration", str(RAMP_S),
            "--request-count", str(streams), "--extra-inputs", f"max_tokens:{chunks}", "--ui", "none",
            "--export-level", "raw", "--output-artifact-dir", folder,
        ]  # fmt: skip
        subprocess.run(
            command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=lambda: os.sched_setaffinity(0, {arguments.generator_cpu}),
        )  # fmt: skip
        lines = (Path(folder) / "profile_export_raw.jsonl").read_text().splitlines()
    return dict(map(_chunks_of, map(json.loads, lines)))


def _chunks_of(record: dict[str, Any]) -> tuple[int, list[float]]:
    """The stream's number and the arrival of each chunk that carries text."""
    content = record["payload"]["messages"][-1]["content"]
    text = content if isinstance(content, str) else content[0]["text"]
    times = [
        response["perf_ns"] / 1e9
        for response in record["responses"]
        for packet in response["packets"]
        if '"content": "w' in packet["value"]
    ]
    return int(text.split()[-1]), times


def highest(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    """The highest rate whose median lag p99 is below the limit, with every event there."""
    best = None
    for rate in sorted({row["events_per_s"] for row in rows}):
        of_rate = [row for row in rows if row["generator"] == name and row["events_per_s"] == rate]
        whole = of_rate and all(row["all_events_arrived"] for row in of_rate)
        if whole and median(row["lag_p99_ms"] for row in of_rate) < LIMIT_MS:
            best = rate
    return best


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
