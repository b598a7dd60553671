"""A result of run.py as Markdown: what was predicted of each checkpoint and what was measured, then the targets.

python benchmarks/plan/table.py benchmarks/plan/results/NAME.json
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("weights", "KV tokens", "inter-token latency", "time to first token")


def main() -> None:
    result = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print("\n".join([*_models(result), "", *_targets(result)]))


def _models(result: dict[str, Any]) -> Iterator[str]:
    yield "| model | scheme | " + " | ".join(f"{name}: predicted, measured" for name in NAMES) + " |"
    yield "|---" * (2 + len(NAMES)) + "|"
    for name, schemes in result["models"].items():
        for scheme, found in schemes.items():
            cells = [_cell(found["outcomes"][outcome]) for outcome in NAMES]
            yield f"| {name} | {scheme} | " + " | ".join(cells) + " |"


def _cell(one: dict[str, Any]) -> str:
    return f"{_amount(one, one['predicted'])}, {_amount(one, one['measured'])} ({one['off']:+.1%})"


def _amount(one: dict[str, Any], value: float) -> str:
    if one["unit"] == "bytes":
        return f"{value / 2**20:,.1f} MiB"
    return f"{1e3 * value:.1f} ms" if one["unit"] == "s" else f"{value:,.0f}"


def _targets(result: dict[str, Any]) -> Iterator[str]:
    yield "| model | target | met by a checkpoint | chosen | nearest miss | right |"
    yield "|---|---|---|---|---|---|"
    for one in result["targets"]:
        cells = [
            one["model"], f"{one['target']} ({one['flag']})", "yes" if one["feasible"] else "no",
            one["chosen"] or "none", one["nearest_miss"] or "–", "yes" if one["right"] else "no",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
