"""AutoAWQ's and AutoGPTQ's formats read by the tools they come from: bit-equal weights, and transformers' answer.

    python -m benchmarks.formats.run --out benchmarks/formats/results/NAME.json

Each case is quantized by Lowbit and exported to its format. The weights of the checkpoint that it was exported from,
dequantized by the compressed-tensors package, are the reference for what the tool unpacks from the exported files.
Each tool has its own environment under `--work`, made once and reused. The standard library suffices here.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quantizers.environments import environment
from benchmarks.quantizers.provenance import hardware, revision, sha256, versions

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
RECIPE = "awq-g64"
PROMPT = "What is the capital of France?"


@dataclass(frozen=True)
class Case:
    """A scheme and a method in one of the older formats; `tool` reads it and has given it its name."""

    name: str
    tool: str
    scheme: str
    method: str

    @property
    def settings(self) -> tuple[str, ...]:
        return f"modules.0.scheme={self.scheme}", f"modules.0.methods=[{self.method}]"


CASES = (
    Case("awq-4", "autoawq", "W4A16", "awq"),
    Case("rtn-4-asymmetric", "autoawq", "W4A16_ASYM", "rtn"),
    Case("gptq-4", "autogptq", "W4A16", "gptq"),
    Case("rtn-8", "autogptq", "W8A16", "rtn"),
)


def lowbit(python: Path, *words: str | Path) -> None:
    """Run `lowbit` of an environment."""
    command = [python.parent / "lowbit", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=quiet())


def quantized_and_exported(
    case: Case, python: Path, model: Path, work: Path, common: tuple[str, ...]
) -> tuple[Path, Path]:
    """A checkpoint of `model`, which is reused where it is finished, and what it is exported to."""
    twin, exported = work / f"{case.name}-twin", work / case.name
    options = [word for setting in (*common, *case.settings) for word in ("--set", setting)]
    lowbit(python, "quantize", "--model", model, "--recipe", RECIPE, "--out", twin, *options)
    shutil.rmtree(exported, ignore_errors=True)
    lowbit(python, "export", twin, "--to", case.tool, "--out", exported)
    return twin, exported


def answer(python: Path, script: str, *arguments: str | Path) -> dict[str, Any]:
    """The JSON object in the last line of a script of this folder."""
    run = subprocess.run(
        [python, HERE / script, *arguments], check=True, stdout=subprocess.PIPE, text=True, env=quiet()
    )
    return dict(json.loads(run.stdout.splitlines()[-1]))


def quiet() -> dict[str, str]:
    settings = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **settings, "GPTQMODEL_CPU_WORKERS": "2", "OMP_NUM_THREADS": str(os.cpu_count())}


def examined(case: Case, python: Path, model: Path, work: Path, common: tuple[str, ...]) -> dict[str, Any]:
    """Quantize and export a case, unpack it with its tool, and open it with transformers."""
    twin, checkpoint = quantized_and_exported(case, python, model, work, common)
    reference = work / f"{case.name}.safetensors"
    subprocess.run([python, HERE / "reference.py", "--checkpoint", twin, "--out", reference], check=True)
    files = ("--checkpoint", checkpoint, "--reference", reference)
    found: dict[str, Any] = {"case": case.name, "tool": case.tool, "settings": case.settings}
    found["unpacked"] = answer(environment(case.tool, work), f"unpack_{case.tool}.py", *files)
    reference.unlink()
    both = ("--checkpoint", checkpoint, "--twin", twin, "--prompt", PROMPT)
    found["transformers"] = answer(environment("gptqmodel", work), "load_transformers.py", *both)
    return found


def finished(out: Path) -> list[dict[str, Any]]:
    """The cases that an earlier call has left in the result."""
    return list(json.loads(out.read_text(encoding="utf-8"))["cases"]) if out.exists() else []


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(".bench/formats"), help="environments and outputs")
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON file; cases that it holds are not run again"
    )
    parser.add_argument("--model", type=Path, required=True, help="base model directory")
    parser.add_argument(
        "--lowbit-python", type=Path, required=True, help="an environment with lowbit[quantize]"
    )
    parser.add_argument("--sequences", type=int, default=2, help="calibration sequences of 512 tokens")
    return parser.parse_args()


def main() -> None:
    arguments = options()
    work, model = arguments.work.resolve(), arguments.model.resolve()
    python = arguments.lowbit_python.absolute()
    work.mkdir(parents=True, exist_ok=True)
    common = (
        f"calibration.num_samples={arguments.sequences}",
        "quality.num_samples=2",
        "kv_cache.dtype=none",
    )
    facts = {
        "hardware": hardware(),
        "model": model.name,
        "model_sha256": sha256(sorted(model.glob("*.safetensors"))),
        "recipe": {"name": RECIPE, "settings": common},
    }
    cases = finished(arguments.out)
    for case in CASES:
        if case.name in {done["case"] for done in cases}:
            continue
        started_from = revision(REPOSITORY)
        found = examined(case, python, model, work, common)
        tools = {tool: versions(environment(tool, work)) for tool in (case.tool, "gptqmodel")}
        where = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "git_revision": started_from,
            "versions": {**tools, "lowbit": versions(python)},
        }
        cases.append({**found, **where})
        arguments.out.write_text(json.dumps({**facts, "cases": cases}, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(found), file=sys.stderr, flush=True)
    counts = [case["unpacked"] for case in cases]
    if any(count["float32_different"] or count["float16_different"] for count in counts):
        raise SystemExit("some weights differ; see the result")
    print(f"{sum(count['weights'] for count in counts):,} weights in {len(cases)} cases, all bit-equal")


if __name__ == "__main__":
    main()
