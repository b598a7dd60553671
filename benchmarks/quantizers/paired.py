"""Each of Lowbit's checkpoints against the best peer in the same preset, row by row: a Markdown table.

    python benchmarks/quantizers/paired.py benchmarks/quantizers/results/float_blocks.json [--text unseen]

The differences of the rows' KL are what both tools have not in common: their standard error is a fraction of that of
either mean. Standard library only.
"""

import argparse
import json
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

Run = dict[str, Any]


def difference(one: Run, other: Run, text: str = "quality") -> tuple[float, float]:
    """Mean of the rows' KL of `one` less those of `other`, in nats, and its standard error."""
    rows = zip(one[text]["kl_by_row"], other[text]["kl_by_row"], strict=True)
    off = [mine - theirs for mine, theirs in rows]
    return fmean(off), stdev(off) / math.sqrt(len(off))


def lines(runs: list[Run], text: str = "quality") -> list[str]:
    """The table: every run with its KL, and Lowbit's with the difference to the peer that is lowest in its preset."""

    def kl(run: Run) -> float:
        return float(run[text]["mean_kl_nats"])

    found = [
        "| preset | | directory | KL (nats) | less the best peer | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for preset in dict.fromkeys(run["case"]["family"] for run in runs):
        some = sorted((run for run in runs if run["case"]["family"] == preset), key=kl)
        peers = [run for run in some if run["case"]["tool"] != "lowbit"]
        for run in some:
            off = ""
            if peers and run["case"]["tool"] == "lowbit":
                mean, error = difference(run, peers[0], text)
                off = f"{mean:+.4f} ± {error:.4f} ({mean / error:+.1f} errors)"
            error = run[text]["mean_kl_standard_error"]
            cells = (
                preset, run["case"]["label"], f"{run['output_bytes'] / 1e6:.1f} MB",
                f"{kl(run):.4f} ± {error:.4f}", off, f"{run['cpu_s']:.0f}",
            )  # fmt: skip
            found.append("| " + " | ".join(cells) + " |")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument(
        "--text", choices=("quality", "unseen"), default="quality", help="the text that judges"
    )
    arguments = parser.parse_args()
    runs = json.loads(arguments.result.read_text(encoding="utf-8"))["runs"]
    print("\n".join(lines(runs, arguments.text)))


if __name__ == "__main__":
    main()
