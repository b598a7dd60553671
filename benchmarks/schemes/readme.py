"""README's table of bytes, KL and speeds side by side: python benchmarks/schemes/readme.py [--write].

Speeds are run.py's (`results/`). KL is of benchmarks/quantizers' one judge, with an unquantized cache as the speeds:
`field.json` for 4 bits, `eight_bits.json` for int8. `--write` puts the tables
between their markers in README.md. Standard library only.
"""

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "core"))
from lowbit_core.cpu_speeds import SETS  # noqa: E402

RESULTS = Path(__file__).parent / "results"
QUANTIZERS = ROOT / "benchmarks" / "quantizers" / "results"
START, END = "<!-- schemes/readme.py -->\n", "<!-- end -->"
MEASURES = ("prompt", "output at 1", "output at 4", "output at 16")
HEAD = ["", "weights", "mean KL", "prompt tokens/s", "output tokens/s, 1 stream", "4 streams", "16 streams"]
ROWS = {  # by checkpoint: what it is called, and whose judged case its KL is
    "bf16": ("bf16", None),
    "w4a16": ("W4A16 (`{}`)", ("field.json", "lowbit-awq-bare")),
    "w8a8": ("W8A8 (`w8a8`)", ("eight_bits.json", "lowbit-w8a8-smoothquant+gptq")),
}
BESIDE = "-zentorch"  # of a row's checkpoint, served with it; shown where it was measured
MODELS = {  # by `model` of a result: recipe of W4A16, and MiB of the tensors, as `lowbit inspect` says
    "SmolLM2-135M": ("awq-g64", {"bf16": 256.6, "w4a16": 107.9, "w8a8": 155.9}),
    "1B, random weights": ("rtn", {"bf16": 2048.1, "w4a16": 670.6, "w8a8": 1121.6}),
}
JUDGED = "SmolLM2-135M"  # the model of benchmarks/quantizers


def tables() -> str:
    """A table for each result of bf16, W4A16 and W8A8, in the order of their names."""
    found = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"), reverse=True)
    ]
    return "\n\n".join(table(result) for result in found if ROWS.keys() <= result["rounds"].keys()) + "\n"


def table(result: dict[str, Any]) -> str:
    """One result: the model and the processor's instructions in the first cell."""
    if result["model"] not in MODELS:
        raise SystemExit(
            f"{result['model']}: its recipe and sizes are not in MODELS of {Path(__file__).name}"
        )
    recipe, sizes = MODELS[result["model"]]
    rows = [[f"{result['model']}, {SETS[result['instructions']]}", *HEAD[1:]], ["---"] * len(HEAD)]
    for name, (label, judged) in ROWS.items():
        kl = _kl(judged) if result["model"] == JUDGED else "–"
        for served in (name, name + BESIDE):
            if served in result["rounds"]:
                speeds = [_speed(result, served, measure) for measure in MEASURES]
                called = label.format(recipe) + (", zentorch" if served != name else "")
                rows.append([called, f"{sizes[name]:,.1f} MiB", kl, *speeds])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _speed(result: dict[str, Any], name: str, measure: str) -> str:
    """The mean over rounds, and its ratio to bf16's with its standard error."""
    mean = fmean(turn[measure] for turn in result["rounds"][name])
    speed = f"{mean:,.0f}" if mean >= 100 else f"{mean:.1f}"
    if name == next(iter(ROWS)):
        return speed
    ratio = result["ratios"][name][measure]
    error = "" if ratio["error"] is None else f" ± {ratio['error']:.2f}"
    return f"{speed} ({ratio['ratio']:.2f}{error})"


def _kl(judged: tuple[str, str] | None) -> str:
    """As the judge measured it."""
    if judged is None:
        return "0"
    file, case = judged
    runs = json.loads((QUANTIZERS / file).read_text(encoding="utf-8"))["runs"]
    found = [run["quality"] for run in runs if run["case"]["name"] == case]
    error = max(one["mean_kl_standard_error"] for one in found)
    return f"{fmean(one['mean_kl_nats'] for one in found):.4f} ± {error:.4f}"


def shown() -> tuple[str, str, str]:
    """README before, between and after the markers."""
    before, _, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition(START)
    between, _, after = rest.partition(END)
    return before, between, after


def main() -> None:
    text = tables()
    if "--write" in sys.argv[1:]:
        before, _, after = shown()
        (ROOT / "README.md").write_text(f"{before}{START}{text}{END}{after}", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
