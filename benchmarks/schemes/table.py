"""Writes what run.py measured into the table that `lowbit serve` and `lowbit quantize --dry-run` read.

python benchmarks/schemes/table.py        # of all of benchmarks/schemes/results

A row for each kernel of each result: the mean ratios to the first checkpoint, bf16, whose model `model` names.
"""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TABLE = Path(__file__).resolve().parents[2] / "core" / "lowbit_core" / "cpu_speeds" / "measured.json"
OUTPUT = "output at "


def main() -> None:
    TABLE.write_text(table(RESULTS), encoding="utf-8")


def table(results: Path) -> str:
    """The JSON of all results that are for the table (`table: true`), in the order of their names."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
    rows = [row for document in documents if document["table"] for row in _rows(document)]
    return json.dumps(rows, indent=1) + "\n"


def _rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "scheme": found["scheme"],
            "kernel": found["kernel"],
            "instructions": document["instructions"],
            "processor": document["hardware"]["processor"],
            "model": document["model"],
            "prompt": document["ratios"][name]["prompt"]["ratio"],
            "output": {
                measure.removeprefix(OUTPUT): ratio["ratio"]
                for measure, ratio in document["ratios"][name].items()
                if measure.startswith(OUTPUT)
            },
        }
        for name, found in document["checkpoints"].items()
        if found["scheme"] != "none"
    ]


if __name__ == "__main__":
    main()
