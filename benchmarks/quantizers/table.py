"""Results of run.py as Markdown: python benchmarks/quantizers/table.py [--write]. Standard library only.

`--write` puts the tables between their markers: of the whole field in benchmarks/README.md, of both texts in README.md.
"""

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
FIELD, BOTH_TEXTS = RESULTS / "field.json", RESULTS / "both_texts.json"
START, END = "<!-- quantizers/table.py -->\n", "<!-- end -->"
FAMILIES = {
    "gptq": "GPTQ, symmetric",
    "awq": "AWQ, symmetric",
    "awq-asymmetric": "AWQ, asymmetric",
}
FLOORS = {"gptq": "rtn", "awq": "rtn", "awq-asymmetric": "rtn-asymmetric"}
Run = dict[str, Any]
Cases = dict[str, list[Run]]


def by_case(runs: list[Run], families: set[str]) -> Cases:
    """The runs of each case of `families`, the lowest divergence first."""
    found: Cases = {}
    for run in runs:
        if run["case"]["family"] in families:
            found.setdefault(run["case"]["name"], []).append(run)
    return dict(sorted(found.items(), key=lambda item: kl(item[1])))


def kl(runs: list[Run]) -> float:
    return fmean(run["quality"]["mean_kl_nats"] for run in runs)


def cpu_s(runs: list[Run]) -> float:
    return fmean(run["cpu_s"] for run in runs)


def peak(runs: list[Run]) -> float:
    return float(max(run["peak_rss_bytes"] for run in runs))


def label(runs: list[Run]) -> str:
    """Tool, version and settings; Lowbit's version is the git revision."""
    case = runs[-1]["case"]
    tool, _, rest = case["label"].partition(" ")
    if case["tool"] == "lowbit":
        return f"**{tool}** {rest}"
    settings = ", ".join(f"{key}={value}" for key, value in case["settings"].items())
    versions = {name.replace("-", ""): version for name, version in runs[-1]["versions"].items()}
    return f"{tool} {versions[case['tool']]} {rest}" + (f" ({settings})" if settings else "")


def each(runs: list[Run], key: str) -> str:
    """Every run's figure; one figure is one run."""
    return ", ".join(f"{run[key]:.0f}" for run in runs)


def quality(runs: list[Run]) -> list[str]:
    """Divergence, perplexity and agreement; runs that wrote other weights are listed one by one."""
    different = list({run["weights_sha256"]: run["quality"] for run in runs}.values())
    return [
        ", ".join(f"{q['mean_kl_nats']:.4f} ± {q['mean_kl_standard_error']:.4f}" for q in different),
        ", ".join(f"{q['perplexity']:.2f}" for q in different),
        ", ".join(f"{100 * q['top1_agreement']:.1f} %" for q in different),
    ]


def grid(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def family_table(result: dict[str, Any], family: str) -> str:
    """One line for each case of a family and, last, round to nearest at the same symmetry."""
    cases = by_case(result["runs"], {family}) | by_case(result["runs"], {FLOORS[family]})
    rows = [
        [
            label(runs),
            each(runs, "cpu_s"),
            each(runs, "wall_s"),
            f"{peak(runs) / 1e6:.0f}",
            f"{runs[-1]['output_bytes'] / 1e6:.1f}",
            *quality(runs),
        ]
        for runs in cases.values()
    ]
    head = ["CPU s", "wall s", "peak RSS MB", "output MB", "KL (nats)", "perplexity", "top-1"]
    return grid([FAMILIES[family], *head], rows)


def comparison(result: dict[str, Any]) -> str:
    """Each of Lowbit's cases against the best peer of its family, for each figure on its own."""
    rows = []
    for family in FAMILIES:
        cases = by_case(result["runs"], {family})
        peers = [runs for name, runs in cases.items() if not name.startswith("lowbit")]
        for name, runs in cases.items():
            if not name.startswith("lowbit") or not peers:
                continue
            ratios = [kl(runs) / min(map(kl, peers)), cpu_s(runs) / min(map(cpu_s, peers))]
            ratios.append(peak(runs) / min(map(peak, peers)))
            symmetry = FAMILIES[family].rpartition(" ")[2]
            rows.append([f"{label(runs)}, {symmetry}", *(f"{ratio:.2f}" for ratio in ratios)])
    return grid(
        ["", "KL of the lowest peer's", "CPU s of the fastest peer's", "peak RSS of the smallest peer's"],
        rows,
    )


def texts_table(result: dict[str, Any]) -> str:
    """Divergence on the unseen text, the lowest first, and on the bundled one; a line for each case."""
    cases: Cases = {}
    for run in sorted(result["runs"], key=lambda one: float(one["unseen"]["mean_kl_nats"])):
        cases.setdefault(run["case"]["name"], []).append(run)
    rows = []
    for runs in cases.values():
        symmetry = "symmetric" if runs[0]["case"]["symmetric"] else "asymmetric"
        figures = [divergence(runs[0][text]) for text in ("unseen", "quality")]
        agreement = f"{100 * runs[0]['unseen']['top1_agreement']:.1f} %"
        rows.append([f"{label(runs)}, {symmetry}", *figures, agreement, each(runs, "cpu_s")])
    return grid(["", "KL, unseen text", "KL, bundled text", "top-1, unseen", "CPU s"], rows)


def divergence(quality: dict[str, Any]) -> str:
    return f"{quality['mean_kl_nats']:.4f} ± {quality['mean_kl_standard_error']:.4f}"


def tables() -> dict[Path, str]:
    """What belongs between the markers of each file."""
    field, texts = (json.loads(path.read_text(encoding="utf-8")) for path in (FIELD, BOTH_TEXTS))
    full = [family_table(field, family) for family in FAMILIES if by_case(field["runs"], {family})]
    return {
        ROOT / "benchmarks" / "README.md": "\n\n".join([*full, comparison(field)]) + "\n",
        ROOT / "README.md": texts_table(texts) + "\n",
    }


def shown(path: Path) -> tuple[str, str, str]:
    """A file before, between and after the markers."""
    before, _, rest = path.read_text(encoding="utf-8").partition(START)
    between, _, after = rest.partition(END)
    return before, between, after


def main() -> None:
    for path, text in tables().items():
        if "--write" in sys.argv[1:]:
            before, _, after = shown(path)
            path.write_text(f"{before}{START}{text}{END}{after}", encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
