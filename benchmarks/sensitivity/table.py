"""The tables of `results/*.json` as Markdown; `--write` puts them into ../README.md. Standard library only."""

import argparse
import json
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- sensitivity/table.py -->", "<!-- end -->"
NAMES = {
    "uniform-4": "W4A16 everywhere",
    "uniform-5": "W5A16 everywhere",
    "uniform-4-5": "W5A16 in every second layer, else W4A16",
    "uniform-4-8": "W8A8 in every eighth layer, else W4A16",
    "ends-8": "first and last two layers W8A8, else W4A16",
    "ends-8-integers": "first and last two layers W8A16, else W4A16",
    "served-4.5": "allocated, {W4A16, W8A8}",
    "served-4.53": "allocated, {W4A16, W8A8}",
    "integers-4.25": "allocated, {3, 4, 5, 6, 8} bits",
    "integers-4.5": "allocated, {3, 4, 5, 6, 8} bits",
    "integers-5": "allocated, {3, 4, 5, 6, 8} bits",
    "autoscheme-integers": "AutoRound's AutoScheme, {3, 4, 5, 6, 8} bits",
    "autoscheme-served": "AutoRound's AutoScheme, {4, 8} bits",
}
PAIRS = (  # an allocated checkpoint and one that it is held against
    ("served-4.5", "uniform-4-8"),
    ("served-4.5", "ends-8"),
    ("served-4.53", "ends-8"),
    ("integers-4.5", "uniform-4-5"),
    ("integers-4.5", "ends-8-integers"),
    ("integers-5", "uniform-5"),
    ("served-4.5", "autoscheme-served"),
    ("integers-4.5", "autoscheme-integers"),
)
Run = dict[str, Any]


def kl(run: Run, text: str) -> str:
    return f"{run[text]['mean_kl_nats']:.4f} ± {run[text]['mean_kl_standard_error']:.4f}"


def predictions(result: dict[str, Any]) -> list[str]:
    """Every checkpoint, in the order of its bits."""
    lines = [
        "| schemes | code bits | directory | predicted KL | KL, bundled | off | KL, unseen |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in sorted(result["runs"], key=lambda one: (round(one["bits"], 2), one["name"])):
        predicted = factor(result, run) * run["predicted_kl_raw"]
        off = predicted / run["quality"]["mean_kl_nats"] - 1
        cells = (
            NAMES[run["name"]], f"{run['bits']:.3f}", f"{run['output_bytes'] / 1e6:.1f} MB", f"{predicted:.4f}",
            kl(run, "quality"), f"{100 * off:+.0f} %", kl(run, "unseen"),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    for run in result.get("peers", []):
        peer = (
            NAMES[run["case"]["name"]],
            f"{bits(run):.3f}",
            "–",
            "–",
            kl(run, "quality"),
            "–",
            kl(run, "unseen"),
        )
        lines.append("| " + " | ".join(peer) + " |")
    return lines


def bits(run: Run) -> float:
    """Bits of a code in the mean; a peer's are those that it was given."""
    return float(run["bits"] if "bits" in run else run["case"]["settings"]["auto_scheme"]["avg_bits"])


def factor(result: dict[str, Any], run: Run) -> float:
    """What a run's prediction is corrected by: what the checkpoints before it lost, over what was predicted of them."""
    runs = {one["name"]: one for one in result["runs"]}
    known = [runs[name] for name in run["case"]["corrected_by"] if name in runs]
    logs = [math.log(one["quality"]["mean_kl_nats"] / one["predicted_kl_raw"]) for one in known]
    return math.exp(fmean(logs)) if logs else 1.0


def differences(result: dict[str, Any]) -> list[str]:
    """Allocated less others of about the same bits, row by row, with the standard error of the paired difference."""
    runs = {run["name"]: run for run in result["runs"]}
    runs |= {run["case"]["name"]: run for run in result.get("peers", [])}
    lines = ["| allocated | less | bundled | unseen |", "|---|---|---|---|"]
    for ours, other in PAIRS:
        if ours in runs and other in runs:
            cells = [difference(runs[ours], runs[other], text) for text in ("quality", "unseen")]
            words = [f"{NAMES[name]}, {bits(runs[name]):.2f} bits" for name in (ours, other)]
            lines.append("| " + " | ".join([*words, *cells]) + " |")
    return lines


def difference(one: Run, other: Run, text: str) -> str:
    rows = zip(one[text]["kl_by_row"], other[text]["kl_by_row"], strict=True)
    off = [mine - theirs for mine, theirs in rows]
    error = stdev(off) / math.sqrt(len(off))
    return f"{fmean(off):+.4f} ± {error:.4f} ({fmean(off) / error:+.1f} errors)"


def costs(result: dict[str, Any]) -> list[str]:
    """CPU seconds of the sensitivities beside a GPTQ run of as many tokens."""
    names = {
        "sensitivity": "`lowbit sensitivity`, six candidates",
        "sensitivity-served": "`lowbit sensitivity`, W4A16 and W8A8",
        "gptq": "`lowbit quantize`, GPTQ, W4A16",
    }
    lines = ["| 4,096 tokens | CPU s | peak memory |", "|---|---|---|"]
    for name, words in names.items():
        if one := result["costs"].get(name):
            lines.append(f"| {words} | {one['cpu_s']:.0f} | {one['peak_rss_bytes'] / 1e9:.2f} GB |")
    return lines


def tables() -> str:
    """All of them, of every committed result."""
    parts = []
    for path in sorted((HERE / "results").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        rows, judged = result["scenario"]["rows"], len(result["runs"][0]["quality"]["kl_by_row"])
        parts += [
            f"`results/{path.name}`: {rows} x 512 calibration tokens, judged on {judged} + {judged} rows.",
            "",
        ]
        parts += [*costs(result), "", *predictions(result), "", *differences(result), ""]
    return "\n".join(parts).strip()


def shown() -> str:
    """What the README shows."""
    return README.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true")
    if not parser.parse_args().write:
        print(tables())
        return
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(f"{before}{BEGIN}\n{tables()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
