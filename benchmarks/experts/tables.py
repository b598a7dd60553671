"""Markdown tables of a result of run.py: `python benchmarks/experts/tables.py RESULT.json`. Standard library only."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

PLAIN = {"bits": 16}


def weights_of(run: dict[str, Any]) -> dict[str, Any]:
    return run.get("weights", PLAIN)


def share_of(run: dict[str, Any]) -> float:
    return float(run.get("experts", {}).get("prune", 0))


def grid(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def quantized(results: list[dict[str, Any]]) -> str:
    """4 bits by method, against round to nearest at the same group size."""
    found = [r for r in results if share_of(r["run"]) == 0 and weights_of(r["run"]).get("bits", 4) == 4]
    nearest = {
        weights_of(r["run"])["group_size"]: r["mean_kld"]
        for r in found
        if weights_of(r["run"])["method"] == "rtn"
    }
    rows = []
    for r in found:
        weights = weights_of(r["run"])
        size = weights["group_size"]
        ratio = f"{r['mean_kld'] / nearest[size]:.2f}" if size in nearest else "–"
        rows.append([weights["method"], str(size), f"{r['mean_kld']:.5f} ± {r['kld_stderr']:.5f}", ratio])
    return grid(["method", "group", "mean KL", "of round to nearest"], rows)


def pruned(results: list[dict[str, Any]]) -> str:
    """bfloat16 weights, calibrated on every domain: KL by criterion and domain."""
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for r in results:
        run = r["run"]
        if share_of(run) and weights_of(run) == PLAIN and "domain" not in run:
            distilled = " + router distillation" if run["experts"].get("router_distillation") else ""
            groups.setdefault((share_of(run), run["experts"]["criterion"] + distilled), []).append(r)
    domains = list(results[0]["domains"])
    rows = []
    for (share, name), runs in sorted(groups.items(), key=lambda item: (item[0][0], mean(item[1]))):
        label = f"{name} (mean of {len(runs)} seeds)" if len(runs) > 1 else name
        cells = [f"{statistics.fmean(r['domains'][domain] for r in runs):.4f}" for domain in domains]
        rows.append([f"{share:.0%}", label, f"**{mean(runs):.4f}**", *cells])
    return grid(["pruned", "criterion", "mean KL", *domains], rows)


def mean(runs: list[dict[str, Any]]) -> float:
    return statistics.fmean(r["mean_kld"] for r in runs)


def one_domain(results: list[dict[str, Any]]) -> str:
    """Half pruned by REAP: KL on each domain when calibrated on all, or on one."""
    half = [r for r in results if share_of(r["run"]) == 0.5 and weights_of(r["run"]) == PLAIN]
    found = [r for r in half if r["run"]["experts"] == {"prune": 0.5, "criterion": "reap"}]
    domains = list(results[0]["domains"])
    rows = [
        [
            r["run"].get("domain", "all"),
            f"{r['mean_kld']:.4f}",
            *(f"**{v:.4f}**" if r["run"].get("domain") == d else f"{v:.4f}" for d, v in r["domains"].items()),
        ]
        for r in found
    ]
    return grid(["calibrated on", "mean KL", *domains], rows)


def frontier(results: list[dict[str, Any]]) -> str:
    """KL against bytes: REAP and AWQ + GPTQ in groups of 64."""
    cells = [
        [f"{size / 1e6:.2f}", f"{share:.0%}", str(bits), f"{kld:.5f}"]
        for size, share, bits, kld in frontier_points(results)
    ]
    return grid(["MB", "pruned", "bits", "mean KL"], cells)


def frontier_points(results: list[dict[str, Any]]) -> list[tuple[int, float, int, float]]:
    """Bytes, share pruned, bits and mean KL of every mix, by bytes."""
    points = []
    for r in results:
        run, weights = r["run"], weights_of(r["run"])
        method, criterion = weights.get("method"), run.get("experts", {}).get("criterion", "reap")
        if "domain" in run or criterion != "reap" or "router_distillation" in run.get("experts", {}):
            continue
        if method in (None, "awq+gptq") and weights.get("group_size", 64) == 64:
            points.append((r["bytes"], share_of(run), weights.get("bits", 4), r["mean_kld"]))
    return sorted(points)


def main() -> None:
    results = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["runs"]
    for part in (quantized, pruned, one_domain, frontier):
        print(f"{part.__doc__}\n\n{part(results)}\n")


if __name__ == "__main__":
    main()
