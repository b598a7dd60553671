"""Prints the tables of results/, for benchmarks/README.md: every step of each run, and KL by domain after each.

python benchmarks/recovery/table.py
"""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def results() -> dict[str, dict[str, Any]]:
    """Every committed result, by name."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))
    }


def won_back(step: dict[str, Any]) -> float:
    """The share of the KL that it found which a training took away."""
    return 1 - float(step["mean_kld"]) / float(step["kld_before"])


def row(number: int, step: dict[str, Any]) -> str:
    """A step as a row."""
    trained = step["trained_parameters"]
    tokens = f"{step['data']['tokens']:,}" if trained else ""
    numbers, share = (f"{trained:,}", f"{won_back(step):.0%}") if trained else ("", "")
    changed = f"{step['changed_bytes']:,}" if trained else ""
    return (
        f"| {number}. {step['step']} | {step['what']} | {numbers} | {tokens} | {step['mean_kld']:.4f} ± "
        f"{step['kld_stderr']:.4f} | {share} | {step['bytes'] / 2**20:,.1f} | {changed} | {step['cpu_seconds']:,.0f} |"
    )


def main() -> None:
    for name, result in results().items():
        print(f"{name}, of {result['base']}:\n")
        print(
            "| step | what | numbers trained | tokens | mean KL | won back | MiB | bytes that changed | CPU s |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for number, step in enumerate(result["steps"], 1):
            print(row(number, step))
        names = sorted(result["domains"][0])
        print(f"\n| mean KL | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
        for number, (step, found) in enumerate(zip(result["steps"], result["domains"], strict=True), 1):
            print(f"| {number}. {step['step']} | {' | '.join(f'{found[one]:.4f}' for one in names)} |")
        print()


if __name__ == "__main__":
    main()
