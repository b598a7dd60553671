"""The table of runtimes in docs/deploy.md, made of the results.

python benchmarks/runtimes/table.py [--write]
"""

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs" / "deploy.md"
BEGIN, END = "<!-- runtimes: begin -->\n", "<!-- runtimes: end -->"
HEAD = (
    "| checkpoint, runtime | first token, ms | tokens/s | memory, MB | KL from the base | KL from the checkpoint |\n"
    "|---|---|---|---|---|---|\n"
)
NAMES = {
    "vllm": "vLLM's CPU engine",
    "vllm:zentorch": "the same with zentorch",
    "openvino": "OpenVINO GenAI",
    "onnx": "ONNX Runtime GenAI, `--activations float32`",
    "onnx:int8": "ONNX Runtime GenAI, `--activations int8`",
    "llama.cpp": "llama.cpp",
}


def table() -> str:
    """All results, a row for each runtime; where its own rounding can be switched off, KL without it in brackets."""
    rows = []
    for path in sorted((HERE / "results").glob("*.json")):
        result = json.loads(path.read_text())
        for name, found in result["runtimes"].items():
            cells = (f"{path.stem}, {NAMES[name]}", *_speeds(found), *_kls(found))
            rows.append(f"| {' | '.join(cells)} |\n")
    return HEAD + "".join(rows)


def shown() -> str:
    """What the page has between its marks."""
    return DOCS.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def _speeds(found: dict[str, Any]) -> tuple[str, ...]:
    first, rate = found["first_s"], found["tokens_per_s"]
    return (
        f"{1000 * first['median']:.0f} ({1000 * first['low']:.0f} to {1000 * first['high']:.0f})",
        f"{rate['median']:.0f} ({rate['low']:.0f} to {rate['high']:.0f})",
        f"{found['memory_bytes'] / 1e6:,.0f}",
    )


def _kls(found: dict[str, Any]) -> tuple[str, ...]:
    if not found["kl"]:
        return ("gives no logits", "")
    by_itself, exact = found["kl"]["by itself"], found["kl"]["exact"]
    cells = []
    for reference, digits in (("from_base", 3), ("from_checkpoint", 5)):
        own, without = (one[reference]["mean"] for one in (by_itself, exact))
        bracket = "" if own == without else f" ({without:.{digits}f})"
        cells.append(f"{own:.{digits}f}{bracket}")
    return tuple(cells)


if __name__ == "__main__":
    if "--write" in sys.argv:
        before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
        DOCS.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
    sys.stdout.write(table())
