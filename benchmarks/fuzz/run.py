"""schemathesis over the OpenAPI document that a running `lowbit serve` answers with.

    python benchmarks/fuzz/run.py CHECKPOINT --work DIR --out benchmarks/fuzz/results/NAME.json

Makes an environment with schemathesis under DIR. Every operation gets schemathesis' examples, its coverage cases and
`--examples` random ones, valid and invalid, with an API key that may do everything. Two checks: no answer is a 5xx,
and every status is in the document. 501 (a field that the engine does not implement) is told apart from failures of
the server only by the document. Exit status 1 on any failure or below 2,000 cases.
"""

import argparse
import json
import subprocess
import sys
import venv
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.endpoint import LOWBIT, lowbit_serve, write_result  # noqa: E402

VERSION = "4.32.5"
CHECKS = "not_a_server_error,status_code_conformance"
FEWEST = 2000


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=120, help="random cases of an operation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    work: Path = arguments.work.resolve()
    program = environment(work)
    made = subprocess.run([LOWBIT, "key", "fuzz"], capture_output=True, text=True, check=True).stdout
    keys = work / "keys.yaml"
    keys.write_text(made.rstrip() + "\n  admin: true\n", encoding="utf-8")
    flags = ("--api-keys", str(keys), "--max-output-tokens", "8", "--tool-call-parser", "hermes")
    key = made.splitlines()[0].removeprefix("# ")
    report = work / "report.ndjson"
    with lowbit_serve(arguments.checkpoint, work / "serve.log", *flags) as server:
        command = [
            str(program), "run", f"{server.url}/openapi.json", "--header", f"Authorization: Bearer {key}",
            "--checks", CHECKS, "--phases", "examples,coverage,fuzzing", "--max-examples", str(arguments.examples),
            "--seed", str(arguments.seed), "--workers", "2", "--continue-on-failure", "--no-shrink",
            "--request-timeout", "120", "--suppress-health-check", "all", "--generation-database", "none",
            "--report-ndjson-path", str(report), "--no-color",
        ]  # fmt: skip
        with (work / "schemathesis.log").open("w") as log:
            status = subprocess.run(
                command, cwd=work, stdout=log, stderr=subprocess.STDOUT, check=False
            ).returncode
        alive = server.process.poll() is None
    statuses, cases = answered(report)
    result = {
        "schemathesis": VERSION, "seed": arguments.seed, "checks": CHECKS, "cases": cases,
        "statuses": statuses, "exit_status": status, "server_alive": alive,
    }  # fmt: skip
    write_result(arguments.out, result)
    print(json.dumps(result))
    return 0 if status == 0 and alive and cases >= FEWEST else 1


def environment(work: Path) -> Path:
    program = work / "fuzz" / "bin" / "schemathesis"
    if not program.exists():
        venv.create(work / "fuzz", with_pip=True)
        pip = program.with_name("pip")
        subprocess.run([pip, "install", "-q", f"schemathesis=={VERSION}"], check=True)
    return program


def answered(report: Path) -> tuple[dict[str, dict[str, int]], int]:
    """How often each operation answered with each status, and all cases."""
    counts: dict[str, Counter[str]] = {}
    for line in report.read_text(encoding="utf-8").splitlines():
        for label, status in _interactions(json.loads(line)):
            counts.setdefault(label, Counter())[str(status)] += 1
    found = {label: dict(sorted(one.items())) for label, one in sorted(counts.items())}
    return found, sum(sum(one.values()) for one in counts.values())


def _interactions(event: dict[str, Any]) -> list[tuple[str, int]]:
    recorder = next(iter(event.values())).get("recorder") or {}
    label = str(recorder.get("label"))
    interactions = recorder.get("interactions", {}).values()
    return [(label, one["response"]["status_code"]) for one in interactions if one.get("response")]


if __name__ == "__main__":
    sys.exit(main())
