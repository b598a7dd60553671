"""Experts pruned and quantized on a small trained mixture of experts: KL to the base, by domain.

    python benchmarks/experts/run.py MODEL --out benchmarks/experts/results/NAME.json

MODEL is a directory with a model and `held.json`, token ids by domain. The first half of each domain gives
calibration rows, the second held-out rows, 512 tokens each. Every run is the walk of `lowbit quantize` (walked.py).
Runs that the result holds already are not repeated, so a stopped script goes on where it was; `tables.py RESULT`
prints the tables.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quantizers"))
from merged_rows import MergeRouterRowsKind
from provenance import hardware, revision, sha256, versions
from walked import absorbed_by, kept_experts, walked

from lowbit_core.manifest import TextRecord
from lowbit_quantize.catalog import CATALOG
from lowbit_quantize.quality.dataset import TokenText
from lowbit_quantize.quality.overlap import token_runs

ROW_TOKENS = 512
METHODS = (["rtn"], ["awq"], ["gptq"], ["awq", "gptq"])
CRITERIA = ("reap", "gated-norm", "man", "ean", "frequency")
SEEDS = 5
SHARES = (0.25, 0.5)
CONSOLIDATIONS = ("average", "permute")
SIMILARITIES = ("router", "output")
MORE_PASSES = replace(CATALOG, passes=(*CATALOG.passes, MergeRouterRowsKind()))


def scenarios(domains: list[str]) -> list[dict[str, Any]]:
    """Every run: keys of its recipe, and the one domain it is calibrated on, if it is one."""
    runs: list[dict[str, Any]] = []
    for share in SHARES:
        runs += [{"passes": [pruning(share, name)]} for name in CRITERIA]
    runs += [quantized(methods, 64) for methods in METHODS]
    for seed in range(SEEDS):
        runs += [{"passes": [pruning(share, "random", seed=seed)]} for share in SHARES]
    reap = [pruning(share, "reap") for share in SHARES]
    runs += [{"passes": [step, "distill_router"]} for step in reap]
    runs += [{"passes": [reap[-1]], "domain": domain} for domain in domains]
    for scheme in ("W4A16", "W8A16"):
        runs += [quantized(["awq", "gptq"], 64, scheme, before=[step]) for step in reap]
    runs.append(quantized(["awq", "gptq"], 64, "W8A16"))
    return runs + [quantized(methods, 128) for methods in METHODS]


def mergings(domains: list[str]) -> list[dict[str, Any]]:
    """Dropping beside merging, with the experts that REAP keeps; router rows as they were, averaged, distilled."""
    ways: list[dict[str, Any]] = [{}]
    ways += [{"consolidate": how, "similarity": near} for how in CONSOLIDATIONS for near in SIMILARITIES]
    best: dict[str, Any] = {"consolidate": "permute", "similarity": "output"}
    runs: list[dict[str, Any]] = [
        {"passes": [pruning(share, "reap", **way)]} for share in SHARES for way in ways
    ]
    for share in SHARES:
        merging = pruning(share, "reap", **best)
        runs.append({"passes": [merging, MergeRouterRowsKind.name]})
        runs += [{"passes": [step, "distill_router"]} for step in (pruning(share, "reap"), merging)]
    return runs


RUNS = {"criteria": scenarios, "merging": mergings}


def pruning(share: float, criterion: str, **options: int | str) -> dict[str, Any]:
    """The pass that prunes a share of the experts."""
    return {"prune_experts": {"prune_ratio": share, "criterion": criterion, **options}}


def quantized(
    methods: list[str], group_size: int, scheme: str = "W4A16", before: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """The keys of a recipe that quantizes every linear, after these passes."""
    rule = {"match": "*", "scheme": scheme, "group_size": group_size, "methods": methods}
    return {"modules": [rule], "passes": [*before, "quantize"]}


def text_of(held: dict[str, list[int]], half: int, rows: int, domain: str | None) -> TokenText:
    """The first `rows` rows of one half of each domain."""
    found, names = [], []
    for name, tokens in held.items():
        middle = len(tokens) // 2
        part = torch.tensor(tokens[middle:] if half else tokens[:middle])
        chosen = part[: len(part) // ROW_TOKENS * ROW_TOKENS].view(-1, ROW_TOKENS)[:rows]
        if domain in (None, name):
            found.append(chosen)
            names += [name] * len(chosen)
    ids = torch.cat(found)
    record = TextRecord(
        dataset="held.json",
        num_samples=len(ids),
        max_seq_length=ROW_TOKENS,
        tokens=ids.numel(),
        seed=0,
        sha256="",
    )
    return TokenText(ids, tuple(names), record)


def measure(model: Path, run: dict[str, Any], calibration: TokenText, heldout: TokenText) -> dict[str, Any]:
    """One walk: bytes and quality."""
    start = time.process_time()
    keys = {key: value for key, value in run.items() if key != "domain"}
    with tempfile.TemporaryDirectory() as folder:
        walk = walked(model, keys, (calibration, heldout), Path(folder) / "checkpoint", MORE_PASSES)
        measured = walk.quality()
    quality = measured.model_dump(include={"mean_kld", "kld_stderr", "top1_agreement", "perplexity_ratio"})
    return {
        "run": run,
        **quality,
        "domains": {name: values["mean_kld"] for name, values in measured.domains.items()},
        "bytes": walk.writer.tensor_bytes,
        "kept_by_layer": kept_experts(walk),
        **({"absorbed_by_layer": merged} if (merged := absorbed_by(walk)) else {}),
        "calibration_rows": len(calibration.ids),
        "cpu_s": round(time.process_time() - start, 1),
    }


def shared_rows(calibration: TokenText, heldout: TokenText) -> dict[str, int]:
    """Held-out rows that share a run of tokens with the calibration rows (templates, tables), by domain."""
    seen = token_runs(calibration.ids)
    found = [not token_runs(row[None]).isdisjoint(seen) for row in heldout.ids]
    return {
        name: sum(here for here, domain in zip(found, heldout.domains, strict=True) if domain == name)
        for name in sorted({d for d, here in zip(heldout.domains, found, strict=True) if here})
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="model directory with held.json")
    parser.add_argument("--out", type=Path, required=True, help="result file; extended where it exists")
    parser.add_argument("--runs", choices=RUNS, default="criteria", help="which runs")
    parser.add_argument("--rows", type=int, default=8, help="calibration rows of each domain")
    parser.add_argument("--heldout-rows", type=int, default=8, help="held-out rows of each domain")
    arguments = parser.parse_args()
    held = json.loads((arguments.model / "held.json").read_text(encoding="utf-8"))
    heldout, every = text_of(held, 1, arguments.heldout_rows, None), text_of(held, 0, arguments.rows, None)
    result: dict[str, Any] = {
        "model": arguments.model.name,
        "model_sha256": sha256([arguments.model / "model.safetensors"]),
        "held_sha256": sha256([arguments.model / "held.json"]),
        "revision": revision(Path(__file__).resolve().parents[2]),
        "hardware": hardware(),
        "versions": versions(Path(sys.executable)),
        "heldout": {
            "rows": len(heldout.ids),
            "row_tokens": ROW_TOKENS,
            "shared": shared_rows(every, heldout),
        },
        "runs": [],
    }
    if arguments.out.exists():
        result["runs"] = json.loads(arguments.out.read_text(encoding="utf-8"))["runs"]
    for run in RUNS[arguments.runs](list(held)):
        if run in [before["run"] for before in result["runs"]]:
            continue
        calibration = text_of(held, 0, arguments.rows, run.get("domain"))
        result["runs"].append(measure(arguments.model, run, calibration, heldout))
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(run), f"{result['runs'][-1]['mean_kld']:.4f}", flush=True)


if __name__ == "__main__":
    main()
