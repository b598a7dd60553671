"""What is lost when channels, heads or layers go, by each criterion: KL to the base, by the walk itself.

    python benchmarks/structure/run.py MODEL --out benchmarks/structure/results/NAME.json [--only NAME …]

Each case is `lowbit quantize` with one pass and no scheme, where its name says so with the method `compensate`: weights
stay in the base's type, so that all that is lost is lost by structure. All cases have the same calibration and held-out
texts (the bundled ones). Cases that the result holds already are not run again, so a stopped script goes on where it
was; `table.py` makes the table. CPU seconds are the process's own, of whole runs; the machine may have been shared, so
they say what order a cost has and no more.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "quantizers"))
from provenance import hardware, revision, sha256, versions  # noqa: E402

from lowbit_core.manifest import Manifest  # noqa: E402
from lowbit_quantize.pipeline import quantize  # noqa: E402
from lowbit_quantize.recipe import parse_recipe  # noqa: E402

WIDTH = ("brain-surgeon", "wanda-sp", "flap", "random")
DEPTH = {"measured": 2, "predicted": 8, "block-influence": 8, "random": 8}  # by how many sequences
CASES: dict[str, dict[str, Any]] = {
    **{f"mlp-25 {one}": {"prune_width": {"mlp_ratio": 0.25, "criterion": one}} for one in WIDTH},
    **{
        f"mlp-25 {one} with biases": {"prune_width": {"mlp_ratio": 0.25, "criterion": one, "biases": True}}
        for one in ("brain-surgeon", "flap")
    },
    **{
        f"depth-20 {one}": {"drop_layers": {"ratio": 0.2, "criterion": one, "num_samples": samples}}
        for one, samples in DEPTH.items()
    },
    **{f"kv-third {one}": {"prune_width": {"kv_groups": 2, "criterion": one}} for one in WIDTH},
}
# The same, where all linears that stay make up for what went.
COMPENSATED = " compensated"
CASES |= {f"{name}{COMPENSATED}": step for name, step in CASES.items() if "random" not in name}


def main() -> None:
    """Run what the result lacks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--calibration", default="16x512", help="sequences x tokens")
    parser.add_argument("--heldout", default="16x256")
    asked = parser.parse_args()
    texts = {"calibration": _text(asked.calibration), "quality": _text(asked.heldout) | {"isolate": False}}
    result = json.loads(asked.out.read_text()) if asked.out.exists() else _begun(asked.model, texts)
    if result["texts"] != texts or result["base_sha256"] != sha256([asked.model / "model.safetensors"]):
        raise SystemExit(f"{asked.out} is of another model or text; give a new file")
    for name in asked.only:
        if name not in result["cases"]:
            result["cases"][name] = _case(asked.model, name, texts)
            partial = asked.out.with_suffix(".part")
            partial.write_text(json.dumps(result, indent=1) + "\n")
            partial.replace(asked.out)
            print(name, result["cases"][name]["mean_kld"], flush=True)


def _text(said: str) -> dict[str, int]:
    sequences, tokens = map(int, said.split("x"))
    return {"num_samples": sequences, "max_seq_length": tokens}


def _begun(model: Path, texts: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": model.name,
        "base_sha256": sha256([model / "model.safetensors"]),
        "texts": texts,
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "versions": versions(Path(sys.executable)),
        "git_revision": revision(HERE.parent.parent),
        "cases": {},
    }


def _case(model: Path, name: str, texts: dict[str, Any]) -> dict[str, Any]:
    step, more = CASES[name], dict[str, Any]()
    passes: list[Any] = [step]
    if name.endswith(COMPENSATED):
        passes.append("quantize")
        more["modules"] = [{"match": "*", "scheme": "none", "methods": ["compensate"]}]
    recipe = parse_recipe({"passes": passes, "kv_cache": {"dtype": "none"}} | more | texts, "of a case")
    before = sum(os.times()[:2])
    with tempfile.TemporaryDirectory() as out:
        manifest = quantize(str(model), recipe, Path(out) / "checkpoint", torch.device("cpu"))
    cpu_s = round(sum(os.times()[:2]) - before, 1)
    return _kept(manifest) | {"pass": step, "cpu_s": cpu_s, "git_revision": revision(HERE.parent.parent)}


def _kept(manifest: Manifest) -> dict[str, Any]:
    quality = manifest.quality
    assert manifest.structure is not None
    errors = [error for one in manifest.figures.values() for error in one.values()]
    return {
        "mean_kld": quality.mean_kld,
        "kld_stderr": quality.kld_stderr,
        "top1_agreement": quality.top1_agreement,
        "perplexity_ratio": quality.perplexity_ratio,
        "predictions": quality.predictions,
        "bytes": manifest.size.bytes,
        "base_bytes": manifest.size.base_bytes,
        "structure": manifest.structure.model_dump(),
        "mean_error": sum(errors) / len(errors) if errors else None,
    }


if __name__ == "__main__":
    main()
