"""What `lowbit quantize --dry-run` says of models too large for this machine, from their published configurations.

    python benchmarks/scale/whole_models.py [--recipe gptq-g64] [--json FILE]   # results/forecast/whole_models.json

Nothing is downloaded and nothing is run: arithmetic on shapes, and rates of this processor that are measured for a
moment. The tokenizer is a tiny one, whose texts have as many tokens. Prints a Markdown table.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "quantizers"), str(ROOT / "benchmarks" / "families")]
from provenance import hardware, revision  # noqa: E402
from scale import MODELS  # noqa: E402

GB, HOUR = 1e9, 3600
GPU_MEMORY_GIB = 74.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="gptq-g64")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    reports = {name: forecast(name, arguments.recipe) for name in MODELS}
    if arguments.json:
        facts = {"hardware": hardware(), "revision": revision(ROOT), "recipe": arguments.recipe}
        arguments.json.write_text(json.dumps({**facts, "models": reports}, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(reports)))


def forecast(name: str, recipe: str) -> dict[str, Any]:
    """The figures of a dry run that a table shows."""
    from tests.tiny_models import tiny_tokenizer
    from transformers import AutoConfig

    from lowbit_quantize.check.preflight import report_on
    from lowbit_quantize.model.reference import ModelReference
    from lowbit_quantize.recipe import load_recipe
    from lowbit_quantize.run.hidden_states import MEMORY_BYTES

    keys = dict(MODELS[name])
    with tempfile.TemporaryDirectory() as directory:
        AutoConfig.for_model(keys.pop("model_type"), **keys).save_pretrained(directory)
        tiny_tokenizer().save_pretrained(directory)
        reference = ModelReference(name, "hub", Path(directory))
        report = report_on(reference, load_recipe(recipe), GPU_MEMORY_GIB, MEMORY_BYTES)
    names = (
        "parameters",
        "checkpoint_bytes",
        "run_disk_bytes",
        "memory_bound_bytes",
        "base_bytes",
        "streams_bytes",
        "effort",
    )
    return {key: report[key] for key in names}


def table(reports: dict[str, dict[str, Any]]) -> list[str]:
    """A row for each model."""
    lines = [
        "| | parameters | read | checkpoint | disk | memory below | hours here | hours of products, one H100 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in reports.items():
        sizes = (
            found[key] / GB
            for key in ("base_bytes", "checkpoint_bytes", "run_disk_bytes", "memory_bound_bytes")
        )
        hours = (
            found["effort"]["seconds_here"] / HOUR,
            found["effort"]["seconds_of_products_on"]["H100"] / HOUR,
        )
        cells = [name, f"{found['parameters'] / GB:.1f} G", *(f"{size:.1f} GB" for size in sizes)]
        lines.append(f"| {' | '.join([*cells, f'{hours[0]:.0f}', f'{hours[1]:.2f}'])} |")
    return lines


if __name__ == "__main__":
    main()
