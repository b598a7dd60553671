"""Whether `lowbit plan` is right: what it predicts of models and schemes on this machine, beside what is then measured.

    python benchmarks/schemes/make.py --random --tokenizer DIR --out DIR      # the model shaped as 1B
    python benchmarks/plan/run.py demo=DIR tiny-moe=DIR 1b=DIR --work DIR --out benchmarks/plan/results/NAME.json
    python benchmarks/plan/table.py benchmarks/plan/results/NAME.json

For each model and each of bf16, W4A16 and W8A8 `lowbit plan --run` makes a checkpoint (rounded to nearest: neither
bytes nor speeds depend on the method), serves it and load-tests it. Then ten targets for the first and the last model,
whose limits lie around what was measured: six that some checkpoint meets, of memory and of latency, and four that none
does. Of each is noted what `lowbit plan` chose or refused, and what the measurements say of that. It wants a quiet
machine. A run that is started again goes on: what lies in `--work` is not measured again.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.endpoint import LOWBIT, write_result  # noqa: E402

SCHEMES = ("bf16", "W4A16", "W8A8")
SHORT = (
    "calibration.num_samples=2", "calibration.max_seq_length=64", "quality.num_samples=2",
    "quality.max_seq_length=64", "quality.isolate=false",
)  # fmt: skip
PLENTY = "64GiB"  # --fit where memory is not the question
ROOM, TIGHT = 1.2, 0.8  # of the best latency that was measured: met, and not
LITTLE = 0.01  # of the memory that a checkpoint needs: met, and not
Outcomes = dict[str, dict[str, Any]]


def main() -> None:
    arguments = _arguments()
    models = dict(one.split("=", 1) for one in arguments.models)
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    flags = [
        "--context", str(arguments.context), "--streams", str(arguments.streams), "--prompt", str(arguments.prompt),
        "--kv-cache", "none", "--profile", str(work / "profile.json"),
    ]  # fmt: skip
    measured = {
        name: {scheme: _checkpoint(directory, scheme, flags, work / name / scheme) for scheme in SCHEMES}
        for name, directory in models.items()
    }
    ends = list(dict.fromkeys([*list(models)[:1], *list(models)[-1:]]))
    targets = [
        one for name in ends for one in _targets(name, models[name], measured[name], flags, work / name)
    ]
    result = {
        "load": {key: getattr(arguments, key) for key in ("context", "streams", "prompt")},
        "profile": json.loads((work / "profile.json").read_text(encoding="utf-8")),
        "models": measured,
        "targets": targets,
    }
    write_result(arguments.out, result)
    print(json.dumps({"right": sum(one["right"] for one in targets), "targets": len(targets)}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--context", type=int, default=384)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def _checkpoint(model: str, scheme: str, flags: list[str], folder: Path) -> dict[str, Any]:
    """What was predicted and measured of a model in one scheme, and the bytes that it needs by prediction."""
    kept = folder / "found.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "first.yaml"
    recipe.unlink(missing_ok=True)
    asked = [model, *flags, "--schemes", scheme, "--fit", PLENTY]
    _plan(*asked, "--out", str(recipe))
    overrides = [*_nearest(recipe), *SHORT]
    report = _plan(*asked, "--run", str(folder), *(part for one in overrides for part in ("--set", one)))
    chosen = report["met"][0]
    outcomes = {one["name"]: one for one in report["run"]["outcomes"]}
    found = {
        "candidate": chosen["candidate"],
        "needed_bytes": chosen["needed_bytes"],
        "itl_parts_s": chosen["itl_parts_s"],
        "ttft_parts_s": chosen["ttft_parts_s"],
        "outcomes": outcomes,
    }
    kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(model, scheme, {name: one["off"] for name, one in outcomes.items()}, flush=True)
    return found


def _nearest(recipe: Path) -> Iterator[str]:
    """The override that rounds a recipe's linears to nearest."""
    import yaml

    rules = yaml.safe_load(recipe.read_text(encoding="utf-8")).get("modules", [])
    plain = [rule | ({} if rule["scheme"] == "none" else {"methods": ["rtn"]}) for rule in rules]
    if plain:
        yield f"modules={json.dumps(plain)}"


def _targets(
    name: str, model: str, measured: dict[str, dict[str, Any]], flags: list[str], folder: Path
) -> Iterator[dict[str, Any]]:
    """Five targets: three that a checkpoint meets, two that none does."""
    needed = {scheme: one["needed_bytes"] for scheme, one in measured.items()}
    itl_s = {scheme: one["outcomes"]["inter-token latency"]["measured"] for scheme, one in measured.items()}
    least, fastest = min(needed.values()), min(itl_s.values())
    asked: list[tuple[str, str, float]] = [
        ("memory of W8A8", "--fit", needed["W8A8"] * (1 + LITTLE)),
        ("memory of W4A16", "--fit", needed["W4A16"] * (1 + LITTLE)),
        ("the best latency and a fifth", "--itl-ms", 1e3 * ROOM * fastest),
        ("less memory than any", "--fit", least * (1 - LITTLE)),
        ("a latency a fifth below the best", "--itl-ms", 1e3 * TIGHT * fastest),
    ]
    for what, flag, limit in asked:
        kept = folder / f"target-{what.replace(' ', '-')}.json"
        if not kept.exists():
            limits = ["--fit", str(int(limit))] if flag == "--fit" else ["--fit", PLENTY, flag, str(limit)]
            report = _plan(model, *flags, "--schemes", ",".join(SCHEMES), *limits)
            values = needed if flag == "--fit" else {key: 1e3 * value for key, value in itl_s.items()}
            kept.write_text(
                json.dumps({"model": name, "target": what} | _judged(report, flag, limit, values)),
                encoding="utf-8",
            )
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        print(found, flush=True)
        yield found


def _judged(report: dict[str, Any], flag: str, limit: float, values: dict[str, float]) -> dict[str, Any]:
    """What was planned for a limit, and whether it is right by the values that were measured."""
    feasible = any(value <= limit for value in values.values())
    met = [one["candidate"].split(",")[0] for one in report["met"]]
    missed = [one["candidate"].split(",")[0] for one in report["missed"]]
    nearest = min(values, key=lambda scheme: values[scheme])
    refused = not met and missed[0] == nearest
    right = bool(met) and values[met[0]] <= limit if feasible else refused
    return {
        "flag": flag,
        "limit": limit,
        "feasible": feasible,
        "chosen": met[0] if met else None,
        "nearest_miss": None if met else missed[0],
        "takes": None if met else report["missed"][0]["takes"],
        "right": right,
    }


def _plan(*flags: str) -> dict[str, Any]:
    done = subprocess.run([str(LOWBIT), "plan", *flags], capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or not done.stdout.strip():
        raise SystemExit(f"lowbit plan ended with status {done.returncode}: {done.stderr.strip()[-1500:]}")
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return report


if __name__ == "__main__":
    main()
