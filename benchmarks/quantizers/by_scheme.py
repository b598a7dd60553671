"""Every scheme by every method, of a result of run.py: a Markdown table.

    python benchmarks/quantizers/by_scheme.py benchmarks/quantizers/results/formats.json

KL in nats, on the bundled text and on the unseen one. Peers have rows of their own. Standard library only.
"""

import argparse
import json
from pathlib import Path
from typing import Any

Run = dict[str, Any]
METHODS = {"rtn": "round to nearest", "awq": "AWQ", "gptq": "GPTQ"}
MISSING = "–"


def lines(runs: list[Run]) -> list[str]:
    """A row for each scheme and tool, the most bits first; what was not run has a dash."""
    rows: dict[tuple[str, str], dict[str, Run]] = {}
    for run in runs:
        case = run["case"]
        if case["scheme"] and case["method"] in METHODS:
            rows.setdefault((case["scheme"], case["tool"]), {})[case["method"]] = run

    def bits(found: dict[str, Run]) -> float:
        return max(float(run["bits_a_weight"]) for run in found.values())

    table = [
        f"| scheme | | bits | directory | {' | '.join(METHODS.values())} |",
        "|---" * (4 + len(METHODS)) + "|",
    ]
    for (scheme, tool), found in sorted(rows.items(), key=lambda row: (-bits(row[1]), row[0])):
        size = max(run["output_bytes"] for run in found.values())
        cells = [scheme, tool, f"{bits(found):.2f}", f"{size / 1e6:.1f} MB"]
        cells += [_kl(found[method]) if method in found else MISSING for method in METHODS]
        table.append(f"| {' | '.join(cells)} |")
    return table


def _kl(run: Run) -> str:
    return ", ".join(f"{run[text]['mean_kl_nats']:.4f}" for text in ("quality", "unseen"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path)
    print("\n".join(lines(json.loads(parser.parse_args().result.read_text(encoding="utf-8"))["runs"])))


if __name__ == "__main__":
    main()
