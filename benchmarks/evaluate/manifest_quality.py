"""The manifest's quality, measured during the walk, against `lowbit evaluate` on the same text.

    python benchmarks/evaluate/manifest_quality.py --out benchmarks/evaluate/results/manifest_quality.json [--moe DIR]

Run it with Lowbit's Python. It quantizes SmolLM2-135M-Instruct with `awq-g64`, and the mixture of experts in `--moe`
(a directory with a model and `held.json`, token ids by domain) dense, pruned and in blocks of floats: the first half
of each domain calibrates; of the second half, rows that share no run of tokens with it are held out. `--only` names
recipes, with `+gptq` for the same one by GPTQ alone. Exit 1 where a mean KL differs by more than its standard error.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "benchmarks" / "quantizers"), str(ROOT)]
from provenance import hardware, revision, versions  # noqa: E402
from scripts.demo import LOWBIT, find_demo_model  # noqa: E402

from lowbit_quantize.quality.overlap import token_runs  # noqa: E402

ROW_TOKENS = 512
ROWS = 4  # of each domain
DEMO_RECIPE = "awq-g64"
MOE_RECIPES = (DEMO_RECIPE, "reap25-awq-g64", "nvfp4", "nvfp4+gptq", "mxfp4", "mxfp4+gptq")
BY_GPTQ = "+gptq"


def main() -> int:
    parser = argparse.ArgumentParser(description="The manifest's quality against lowbit evaluate --text.")
    parser.add_argument("--moe", type=Path, help="a mixture of experts with held.json")
    parser.add_argument("--only", nargs="+", choices=MOE_RECIPES, default=MOE_RECIPES, metavar="RECIPE")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "revision": revision(ROOT),
        "hardware": hardware(),
        "versions": versions(Path(sys.executable)),
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        runs: list[tuple[Path, str, tuple[str, ...]]] = []
        if arguments.moe:
            runs += [(arguments.moe, recipe, texts_of(arguments.moe, work)) for recipe in arguments.only]
        if DEMO_RECIPE in arguments.only:
            runs.append((find_demo_model(), DEMO_RECIPE, ()))
        for model, recipe, flags in runs:
            result["runs"].append(run(model, recipe, flags, work / f"{len(result['runs'])}"))
            arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(
        "| model, recipe | manifest's mean KL | lowbit evaluate | difference | agrees |\n|---|---|---|---|---|"
    )
    for one in result["runs"]:
        manifest, again = one["manifest"], one["evaluate"]
        print(
            f"| {one['model']}, {one['recipe']} | {manifest['mean_kld']:.5f} ± {manifest['kld_stderr']:.5f} | "
            f"{again['mean_kld']:.5f} | {manifest['difference']:+.6f} | {'yes' if manifest['agrees'] else 'NO'} |"
        )
    return 0 if all(one["manifest"]["agrees"] for one in result["runs"]) else 1


def texts_of(moe: Path, work: Path) -> tuple[str, ...]:
    """Flags that calibrate on the first half of each domain and judge by the second."""
    held = json.loads((moe / "held.json").read_text(encoding="utf-8"))
    rows = {
        name: torch.tensor(ids[: len(ids) // ROW_TOKENS * ROW_TOKENS]).view(-1, ROW_TOKENS)
        for name, ids in held.items()
    }
    halves = {name: (each[: len(each) // 2][:ROWS], each[len(each) // 2 :]) for name, each in rows.items()}
    seen = token_runs(torch.cat([first for first, _ in halves.values()]))
    flags: list[str] = []
    for section, half in (("calibration", 0), ("quality", 1)):
        chosen = [
            (name, row) for name, both in halves.items() for row in both[half]
            if half == 0 or token_runs(row[None]).isdisjoint(seen)
        ]  # fmt: skip
        kept = [one for name in halves for one in [each for each in chosen if each[0] == name][:ROWS]]
        file = work / f"{section}.json"
        ids = {"input_ids": [row.tolist() for _, row in kept], "domains": [name for name, _ in kept]}
        file.write_text(json.dumps(ids), encoding="utf-8")
        flags += ["--set", f"{section}.token_ids={file}"]
    return tuple(flags)


def run(model: Path, recipe: str, flags: tuple[str, ...], out: Path) -> dict[str, Any]:
    """Quantize, then evaluate; what both say."""
    named = ["--recipe", recipe.removesuffix(BY_GPTQ)]
    if recipe.endswith(BY_GPTQ):
        named += ["--set", "modules.0.methods=[gptq]"]
    command = [*LOWBIT, "quantize", "--model", str(model), *named, "--out", str(out), *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    file = out.with_suffix(".json")
    command = [*LOWBIT, "evaluate", str(out), "--base", str(model), "--text", "--json", str(file)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    text = json.loads(file.read_text(encoding="utf-8"))["text"]
    names = (
        "predictions",
        "mean_kld",
        "kld_stderr",
        "top1_agreement",
        "perplexity_ratio",
        "kv_cache_included",
    )
    again = {name: text[name] for name in names}
    again["domains"] = {name: values["mean_kld"] for name, values in text["domains"].items()}
    return {"model": model.stem, "recipe": recipe, "manifest": text["manifest"], "evaluate": again}


if __name__ == "__main__":
    sys.exit(main())
