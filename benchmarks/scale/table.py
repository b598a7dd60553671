"""The results of this folder as Markdown: python benchmarks/scale/table.py. Standard library only."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def memory_table(results: list[dict]) -> str:
    """Peak memory against the bound, and CPU seconds of a layer at the start and the end."""
    lines = [
        "| recipe | layers | checkpoint GB | peak RSS GB | bound GB | CPU s a layer: first quarter, last quarter |",
        "|---|---|---|---|---|---|",
    ]
    for run in (run for result in results for run in result["runs"]):
        later = run["layer_cpu_s"][1:]
        part = max(1, len(later) // 4)
        first, last = (sum(some) / part for some in (later[:part], later[-part:]))
        sizes = (run["base_bytes"], run["peak_rss_bytes"], run["bound_bytes"])
        cells = [
            run["method"],
            str(run["layers"]),
            *(f"{size / 1e9:.2f}" for size in sizes),
            f"{first:.1f}, {last:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def kills_line(result: dict) -> str:
    """How many killed runs ended with the same files, by phase."""
    runs = result["runs"]
    phases = {phase: sum(run["phase"] == phase for run in runs) for phase in result["phases"]}
    same = sum(run["identical"] for run in runs)
    counted = ", ".join(f"{phase} {count}" for phase, count in phases.items())
    return f"{len(runs)} killed runs ({counted}): {same} ended with the files of a run that was not killed."


if __name__ == "__main__":
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    print(memory_table([result for name, result in found.items() if name != "kills"]))
    if "kills" in found:
        print()
        print(kills_line(found["kills"]))
