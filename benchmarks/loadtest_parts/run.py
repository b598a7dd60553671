"""Do several parts of one plan send what one machine would, on time, and measure the same?

    python benchmarks/loadtest_parts/run.py --parts 1 2 4 --rate 40 --seconds 30 --repetitions 3 --json FILE

Every number of parts plays the same seeded plan against the tests' timed stand-in, which answers after known delays:
each part is a `lowbit loadtest --part I/N` of its own with one worker, all start at one `--start-at`, and their files
are joined by `lowbit loadtest merge`. Numbers of parts take turns, repetition by repetition. On one machine parts share
its cores, so this shows that parts agree, and not what several machines could send.

Three things are reported. `same_plan`: every request has the send time that it has in one part, to the tenth of a
millisecond. `latest_send_ms`: how late any was sent. `differences`: each number of N parts against one part's, as a
ratio of means over repetitions, beside the spread of one part's own repetitions. The last line on stdout is JSON.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.loadtest.fake_openai import Reply, settings_of  # noqa: E402

LOWBIT = "import sys; from lowbit_core.cli import main; sys.exit(main())"
MEASURES = (
    "ttft_s.p50",
    "ttft_s.p99",
    "inter_token_latency_s.p50",
    "end_to_end_s.p50",
    "output_tokens_per_s",
)
REPLY = Reply(ttft_s=0.08, gap_s=0.02, chunks=24)
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 4], help="the first should be 1")
    parser.add_argument("--rate", type=float, default=40.0, help="requests/s in all")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--starts-in", type=float, default=20.0, help="seconds in which processes import and plan"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[Row] = []
    for repetition in range(arguments.repetitions):
        for parts in arguments.parts:
            rows.append(measure(parts, arguments) | {"repetition": repetition})
            print(
                json.dumps({name: rows[-1][name] for name in rows[-1] if name != "planned"}), file=sys.stderr
            )
    document = {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "rate_rps": arguments.rate,
        "seconds": arguments.seconds,
        "same_plan": all(row["planned"] == rows[0]["planned"] for row in rows),
        "by_parts": {str(parts): summary(rows, parts) for parts in arguments.parts},
        "rows": [{name: value for name, value in row.items() if name != "planned"} for row in rows],
    }
    text = json.dumps(document)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    print(text)


def measure(parts: int, arguments: argparse.Namespace) -> Row:
    """One plan, sent by so many parts."""
    stand_in = ROOT / "tests/loadtest/fake_openai.py"
    command = [sys.executable, "-S", str(stand_in), settings_of([REPLY])]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
    try:
        with tempfile.TemporaryDirectory() as folder:
            return row_of(parts, joined(Path(folder), url, parts, arguments))
    finally:
        server.kill()
        server.communicate()


def joined(folder: Path, url: str, parts: int, given: argparse.Namespace) -> dict[str, Any]:
    """The result of `lowbit loadtest merge`."""
    plan = folder / "plan.yaml"
    arrivals = {"kind": "poisson", "rate_rps": given.rate}
    plan.write_text(
        json.dumps({
            "arrivals": arrivals, "prompts": {"kind": "synthetic", "tokens": 16}, "duration_s": given.seconds,
            "warm_up": {"seconds": given.seconds / 6}, "generator": {"workers": 1},
        })
    )  # fmt: skip
    start_at = datetime.fromtimestamp(time.time() + given.starts_in, UTC).isoformat()
    files = [folder / f"part-{number}.json" for number in range(1, parts + 1)]
    running = [
        lowbit(
            "--target", url, "--scenario", str(plan), "--seed", "7", "--start-at", start_at,
            "--part", f"{number}/{parts}", "--json", str(file),
        )
        for number, file in enumerate(files, 1)
    ]  # fmt: skip
    for process in running:
        _, errors = process.communicate()
        assert process.returncode in (0, 1), errors  # 1: late, which is what is measured
    out = folder / "joined.json"
    _, errors = (merging := lowbit("merge", *map(str, files), "--out", str(out))).communicate()
    assert merging.returncode in (0, 1), errors
    document: dict[str, Any] = json.loads(out.read_text())
    return document


def lowbit(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", LOWBIT, "loadtest", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def row_of(parts: int, document: dict[str, Any]) -> Row:
    table = document["points"][0]["request_table"]
    index, due = table["columns"].index("index"), table["columns"].index("due_s")
    lag = document["lag_s"]
    return {
        "parts": parts,
        "planned": sorted((row[index], round(row[due], 4)) for row in table["rows"]),
        "requests": document["requests"],
        "completed": document["outcomes"]["completed"],
        "valid": document["valid"],
        "invalid_because": document["invalid_because"],
        "starts_apart_ms": 1000 * document["joined"]["starts_apart_s"],
        "send_lag_p99_ms": 1000 * lag["send_p99"],
        "latest_send_ms": 1000 * lag["send_max"],
        "loop_lag_p99_ms": 1000 * lag["loop_p99"],
        **{name: found(document, name) for name in MEASURES},
        "load_average": os.getloadavg()[0],
    }


def found(document: dict[str, Any], name: str) -> float:
    value: Any = document
    for key in name.split("."):
        value = value[key]
    return float(value)


def summary(rows: list[Row], parts: int) -> Row:
    """Means of so many parts, and each against one part's, with the spread of one part's own repetitions."""
    own = [row for row in rows if row["parts"] == parts]
    one = [row for row in rows if row["parts"] == 1]
    differences = {
        name: {
            "ratio": mean(row[name] for row in own) / mean(row[name] for row in one),
            "spread_of_one": (max(row[name] for row in one) - min(row[name] for row in one))
            / mean(row[name] for row in one),
        }
        for name in MEASURES
        if one
    }
    lags = {name: mean(row[name] for row in own) for name in ("send_lag_p99_ms", "loop_lag_p99_ms")}
    return {**lags, "latest_send_ms": max(row["latest_send_ms"] for row in own), "differences": differences}


if __name__ == "__main__":
    main()
