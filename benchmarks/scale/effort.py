"""How long `lowbit quantize --dry-run` says that a run takes, and how long it takes.

    python benchmarks/scale/effort.py MODEL:RECIPE ... --json benchmarks/scale/results/effort.json

The ratio of the two is what `OTHERS` in quantize/lowbit_quantize/check/effort.py stands for, times that.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "quantizers")]
from provenance import hardware, revision, versions  # noqa: E402

LOWBIT = Path(sys.executable).with_name("lowbit")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+", metavar="MODEL:RECIPE")
    parser.add_argument("--work", type=Path, default=ROOT / ".bench" / "effort")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for run in arguments.runs:
        model, _, recipe = run.rpartition(":")
        said = _last_line("--model", model, "--recipe", recipe, "--dry-run")["effort"]
        out = arguments.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        took = _last_line("--model", model, "--recipe", recipe, "--out", str(out))["seconds"]
        rows.append({"model": Path(model).name, "recipe": recipe, **said, "seconds": took})
        rows[-1]["said_over_taken"] = round(said["seconds_here"] / took, 3)
        print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        facts = {"hardware": hardware(), "versions": versions(sys.executable), "revision": revision(ROOT)}
        arguments.json.write_text(json.dumps({**facts, "runs": rows}, indent=1) + "\n")


def _last_line(*flags: str) -> dict[str, Any]:
    done = subprocess.run(
        [str(LOWBIT), "quantize", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
