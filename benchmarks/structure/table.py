"""The table of a committed result, in benchmarks/README.md; --write puts it there. Standard library only."""

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README, RESULT = HERE.parent / "README.md", HERE / "results" / "demo.json"
BEGIN, END = "<!-- structure/table.py -->", "<!-- end -->"
Case = dict[str, Any]


def tables() -> str:
    """Every case, with its KL beside that of chance."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    cases: dict[str, Case] = result["cases"]
    texts, hardware = result["texts"], result["hardware"]
    lines = [
        f"{result['model']}, weights in bf16, {_words(texts['calibration'])} to calibrate, "
        f"{_words(texts['quality'])} held out; {hardware['processor']}, "
        f"{result['threads']} thread(s), shared with other work.",
        "",
        "| what goes | by | mean KL | agreement | perplexity × | of chance's KL | bytes × | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(name, case, cases) for name, case in cases.items()]
    return "\n".join(lines)


def _words(text: dict[str, Any]) -> str:
    return f"{text['num_samples']} x {text['max_seq_length']} tokens"


def _row(name: str, case: Case, cases: dict[str, Case]) -> str:
    what, _, criterion = name.partition(" ")
    chance = cases.get(f"{what} random")
    share = f"{case['mean_kld'] / chance['mean_kld']:.2f}" if chance else ""
    cells = (
        _goes(case["structure"]),
        criterion,
        f"{case['mean_kld']:.3f} ± {case['kld_stderr']:.3f}",
        f"{case['top1_agreement']:.1%}",
        f"{case['perplexity_ratio']:.2f}",
        share,
        f"{case['bytes'] / case['base_bytes']:.3f}",
        f"{case['cpu_s']:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def _goes(structure: dict[str, Any]) -> str:
    """What was taken out, in words."""
    gone = sorted(set(range(structure["layers"])) - set(structure["kept_layers"]))
    if gone:
        return f"layers {' '.join(map(str, gone))} of {structure['layers']}"
    words = {"intermediate_size": "channels of each network", "num_key_value_heads": "key and value heads"}
    return ", ".join(
        f"{before - after} of {before} {words.get(key, key)}"
        for key, (before, after) in structure["sizes"].items()
    )


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
