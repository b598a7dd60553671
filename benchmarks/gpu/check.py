"""`scripts/gpu-check`: the sections of this folder, one after another, within a budget of seconds.

Prints a line for each section and writes all of it as JSON as it grows: to $OUT/gpu.json where OUT is set, else
under results/. Ends with status 1 when a section failed. A machine that lacks a few packages gets them as wheels:

    pip download --no-deps -d wheels compressed-tensors==0.17.0 pydantic pydantic-core ...
    scripts/gpu-check --wheels wheels
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

NEEDED = (
    "torch",
    "transformers",
    "accelerate",
    "compressed_tensors",
    "pydantic",
    "rich",
    "safetensors",
    "scipy",
    "yaml",
)
RESULTS = Path(__file__).resolve().parent / "results"
BUDGET_S = 450.0


def main() -> int:
    arguments = _arguments()
    with ExitStack() as temporary:
        if arguments.wheels:
            site = temporary.enter_context(tempfile.TemporaryDirectory())
            _install(arguments.wheels, site)
            sys.path.insert(0, site)
        _refuse_missing()
        import torch  # only now: what it needs may have come as wheels
        from benchmarks.gpu.report import Report
        from benchmarks.gpu.sections import Place, sections

        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("gpu-check: torch sees no CUDA device here; try --device cpu --tiny")
        place = Place(torch.device(arguments.device), arguments.tiny)
        report = Report(_result_file(place.name, arguments.tiny), arguments.budget)
        for section in sections(place):
            report.run(section, place)
        print(report.summary())
        return 1 if report.failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu-check",
        description="Is each CUDA path right, how fast is each part, what would whole models take?",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="small models and matrices: does every section run?"
    )
    parser.add_argument(
        "--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="sections beyond it are skipped"
    )
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of packages that are missing here")
    arguments = parser.parse_args()
    if arguments.wheels and not list(arguments.wheels.glob("*.whl")):
        parser.error(
            f"--wheels {arguments.wheels}: no *.whl files there; pip download --no-deps -d DIR NAME makes them"
        )
    return arguments


def _install(wheels: Path, site: str) -> None:
    """Unpack wheels into a folder of their own; nothing is fetched and nothing of the machine's is changed."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site]
    if subprocess.run([*command, *sorted(map(str, wheels.glob("*.whl")))], check=False).returncode:
        raise SystemExit(f"gpu-check: pip could not install the wheels of {wheels} (see above)")


def _refuse_missing() -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"gpu-check: {sys.executable} lacks {', '.join(missing)}; set PYTHON to one that has them, "
            "or give them as wheels with --wheels DIR"
        )


def _result_file(device: str, tiny: bool) -> Path:
    if "OUT" in os.environ:
        return Path(os.environ["OUT"]) / "gpu.json"
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return RESULTS / f"{name}{'-tiny' if tiny else ''}.json"


if __name__ == "__main__":
    sys.exit(main())
