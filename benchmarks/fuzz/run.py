"""schemathesis over the OpenAPI document that a running `lowbit serve` answers with.

    python benchmarks/fuzz/run.py CHECKPOINT --work DIR --out benchmarks/fuzz/results/NAME.json

Makes an environment with schemathesis under DIR. Every operation gets schemathesis' coverage cases and
`--examples` random ones, valid and invalid, with an API key that may do everything and has four places. Checked are: no
answer is a 5xx, every status is in the document, and afterwards no request is active, the key has its places, and no
connection is open past the server's bound. Exit status 1 on any failure or below `--fewest` cases.
"""

import argparse
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.endpoint import LOWBIT, lowbit_serve, write_result  # noqa: E402

from lowbit_core.server_process import ServerProcess  # noqa: E402

VERSION = "4.32.5"
CHECKS = "not_a_server_error,status_code_conformance"
PLACES, IDLE_S = 4, 65 + 10  # the server closes idle connections after 65 s
# The Responses API has 7,000 coverage cases, hours on two cores: its random ones stay.
PHASES = {"fuzzing": (), "coverage": ("--exclude-path", "/v1/responses")}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=100, help="random cases of an operation")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--fewest", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    work: Path = arguments.work.resolve()
    program = environment(work)
    made = subprocess.run([LOWBIT, "key", "fuzz"], capture_output=True, text=True, check=True).stdout
    keys = work / "keys.yaml"
    keys.write_text(f"{made.rstrip()}\n  admin: true\n  concurrent_requests: {PLACES}\n", encoding="utf-8")
    flags = ("--api-keys", str(keys), "--max-output-tokens", "64", "--tool-call-parser", "hermes")
    key = made.splitlines()[0].removeprefix("# ")
    statuses: dict[str, dict[str, int]] = {}  # by phase, then by operation and status
    exits = {}
    with lowbit_serve(arguments.checkpoint, work / "serve.log", *flags) as server:
        ask(server, key, "/openapi.json").close()  # made when first asked for; schemathesis waits for 10 s
        for phase in arguments.phases:
            command = [
                str(program), "run", f"{server.url}/openapi.json", "--header", f"Authorization: Bearer {key}",
                "--checks", CHECKS, "--phases", phase, "--max-examples", str(arguments.examples), *PHASES[phase],
                "--seed", str(arguments.seed), "--workers", "1", "--continue-on-failure", "--no-shrink",
                "--request-timeout", "300", "--suppress-health-check", "all", "--generation-database", "none",
                "--report-ndjson-path", str(work / f"{phase}.ndjson"), "--no-color",
            ]  # fmt: skip
            with (work / f"{phase}.log").open("w") as log:
                done = subprocess.run(command, cwd=work, stdout=log, stderr=subprocess.STDOUT, check=False)
            exits[phase] = done.returncode
            statuses[phase] = answered(work / f"{phase}.ndjson")
        left = left_behind(server, key)
        alive = server.process.poll() is None
    cases = sum(sum(phase.values()) for phase in statuses.values())
    result = {
        "schemathesis": VERSION, "seed": arguments.seed, "checks": CHECKS, "cases": cases,
        "statuses": statuses, "exit_status": exits, "server_alive": alive, "left_behind": left,
    }  # fmt: skip
    write_result(arguments.out, result)
    print(json.dumps(result))
    return (
        0 if not any(exits.values()) and alive and not any(left.values()) and cases >= arguments.fewest else 1
    )


def left_behind(server: ServerProcess, key: str) -> dict[str, int]:
    """What is still held: active requests, places of the key, connections that should have been closed."""
    connections = []
    for _ in range(IDLE_S):
        time.sleep(1)
        everything = psutil.Process(server.process.pid).net_connections("tcp")
        connections = [one for one in everything if one.laddr.port == port_of(server) and one.raddr]
        if not connections:
            break
    with ask(server, key, "/metrics") as answer:
        found = re.search(r"^lowbit_requests_active\S* (\S+)$", answer.read().decode(), re.MULTILINE)
    active = int(float(found[1])) if found else -1
    with ThreadPoolExecutor(PLACES) as pool:
        free = sum(pool.map(lambda _: has_place(server, key), range(PLACES)))
    return {"active": active, "places": PLACES - free, "connections": len(connections)}


def has_place(server: ServerProcess, key: str) -> bool:
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], "max_tokens": 32, "ignore_eos": True})
    try:
        with ask(server, key, "/v1/chat/completions", body.encode()) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return False


def ask(server: ServerProcess, key: str, path: str, body: bytes | None = None) -> Any:
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    return urllib.request.urlopen(urllib.request.Request(server.url + path, body, headers), timeout=120)


def port_of(server: ServerProcess) -> int:
    return int(server.url.rpartition(":")[2])


def environment(work: Path) -> Path:
    program = work / "fuzz" / "bin" / "schemathesis"
    if not program.exists():
        venv.create(work / "fuzz", with_pip=True)
        pip = program.with_name("pip")
        subprocess.run([pip, "install", "-q", f"schemathesis=={VERSION}"], check=True)
    return program


def answered(report: Path) -> dict[str, int]:
    """How often each operation answered with each status, as `POST /path 200`."""
    counts: Counter[str] = Counter()
    for line in report.read_text(encoding="utf-8").splitlines():
        for label, status in _interactions(json.loads(line)):
            counts[f"{label} {status}"] += 1
    return dict(sorted(counts.items()))


def _interactions(event: dict[str, Any]) -> list[tuple[str, int]]:
    recorder = next(iter(event.values())).get("recorder") or {}
    label = str(recorder.get("label"))
    interactions = recorder.get("interactions", {}).values()
    return [(label, one["response"]["status_code"]) for one in interactions if one.get("response")]


if __name__ == "__main__":
    sys.exit(main())
