"""Markdown tables of a result of run.py: `python benchmarks/experts/tables.py RESULT.json`. Standard library only."""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BITS = {"W4A16": 4, "W8A16": 8}
PLAIN_BITS = 16
ROUTER = {"distill_router": " + router distillation", "merge_router_rows": ", router's rows averaged"}
Result = dict[str, Any]


@dataclass(frozen=True)
class Mix:
    """What a run's recipe says. Weights without methods are as they are; `domain` is what calibrated, if one did."""

    methods: str
    bits: int
    group_size: int | None
    pruned: float
    criterion: str
    merged: str
    router: str  # what was done to it
    domain: str | None

    @property
    def plain(self) -> bool:
        return not self.methods


def mix_of(result: Result) -> Mix:
    """The recipe of a result, read from its keys `modules` and `passes`."""
    run = result["run"]
    rule: dict[str, Any] = next(iter(run.get("modules", ())), {})
    steps = [step for step in run["passes"] if isinstance(step, dict)]
    pruning = steps[0]["prune_experts"] if steps else {}
    return Mix(
        methods="+".join(rule.get("methods", ())),
        bits=BITS[rule["scheme"]] if rule else PLAIN_BITS,
        group_size=rule.get("group_size"),
        pruned=float(pruning.get("prune_ratio", 0)),
        criterion=pruning.get("criterion", ""),
        merged="{consolidate} by {similarity}".format(**pruning) if "consolidate" in pruning else "",
        router="".join(words for name, words in ROUTER.items() if name in run["passes"]),
        domain=run.get("domain"),
    )


def grid(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def quantized(results: list[Result]) -> str:
    """4 bits by method, against round to nearest at the same group size."""
    found = [(mix, r) for r in results for mix in [mix_of(r)] if not mix.pruned and mix.bits == 4]
    nearest = {mix.group_size: r["mean_kld"] for mix, r in found if mix.methods == "rtn"}
    rows = []
    for mix, r in found:
        size = mix.group_size
        ratio = f"{r['mean_kld'] / nearest[size]:.2f}" if size in nearest else "–"
        rows.append([mix.methods, str(size), f"{r['mean_kld']:.5f} ± {r['kld_stderr']:.5f}", ratio])
    return grid(["method", "group", "mean KL", "of round to nearest"], rows)


def pruned(results: list[Result]) -> str:
    """bfloat16 weights, calibrated on every domain: KL by criterion and domain."""
    groups: dict[tuple[float, str], list[Result]] = {}
    for r in results:
        mix = mix_of(r)
        if mix.pruned and mix.plain and mix.domain is None:
            name = f"{mix.criterion}, {mix.merged}" if mix.merged else mix.criterion
            groups.setdefault((mix.pruned, name + mix.router), []).append(r)
    domains = list(results[0]["domains"])
    rows = []
    for (share, name), runs in sorted(groups.items(), key=lambda item: (item[0][0], mean(item[1]))):
        label = f"{name} (mean of {len(runs)} seeds)" if len(runs) > 1 else name
        cells = [f"{statistics.fmean(r['domains'][domain] for r in runs):.4f}" for domain in domains]
        rows.append([f"{share:.0%}", label, f"**{mean(runs):.4f}**", *cells])
    return grid(["pruned", "criterion", "mean KL", *domains], rows)


def mean(runs: list[Result]) -> float:
    return statistics.fmean(r["mean_kld"] for r in runs)


def one_domain(results: list[Result]) -> str:
    """Half pruned by REAP: KL on each domain when calibrated on all, or on one."""
    half = [(mix, r) for r in results for mix in [mix_of(r)] if mix.pruned == 0.5 and mix.plain]
    found = [(mix.domain, r) for mix, r in half if mix.criterion == "reap" and not mix.router]
    domains = list(results[0]["domains"])
    rows = [
        [
            own or "all",
            f"{r['mean_kld']:.4f}",
            *(f"**{kld:.4f}**" if own == domain else f"{kld:.4f}" for domain, kld in r["domains"].items()),
        ]
        for own, r in found
    ]
    return grid(["calibrated on", "mean KL", *domains], rows)


def frontier(results: list[Result]) -> str:
    """KL against bytes: REAP and AWQ + GPTQ in groups of 64."""
    cells = [
        [f"{size / 1e6:.2f}", f"{share:.0%}", str(bits), f"{kld:.5f}"]
        for size, share, bits, kld in frontier_points(results)
    ]
    return grid(["MB", "pruned", "bits", "mean KL"], cells)


def frontier_points(results: list[Result]) -> list[tuple[int, float, int, float]]:
    """Bytes, share pruned, bits and mean KL of every mix, by bytes."""
    points = []
    for r in results:
        mix = mix_of(r)
        if mix.domain or mix.router or mix.criterion not in ("", "reap"):
            continue
        if mix.plain or (mix.methods, mix.group_size) == ("awq+gptq", 64):
            points.append((r["bytes"], mix.pruned, mix.bits, r["mean_kld"]))
    return sorted(points)


def main() -> None:
    results = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["runs"]
    merging = any(mix_of(r).merged for r in results)
    for part in (pruned,) if merging else (quantized, pruned, one_domain, frontier):
        print(f"{part.__doc__}\n\n{part(results)}\n")


if __name__ == "__main__":
    main()
