"""What recovery wins back: KL to the base on held-out text after each step, by domain, and the curves.

    python benchmarks/recovery/run.py NAME CHECKPOINT --base MODEL --data SOURCE … --work DIR [-- FLAGS]
    python benchmarks/recovery/run.py NAME STEPS.yaml --base MODEL --work DIR

It runs `lowbit distill` with FLAGS, or `lowbit compose`, into DIR/NAME, or goes on with it if it was stopped, and
writes results/NAME.json: the record of each step (settings, curve, cost), quality by domain after it, hardware,
versions and revision. `moe_rows.py` makes rows and steps of the small mixture; `table.py` prints the table.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quantizers"))
from provenance import hardware, revision, versions

from lowbit_core.cli import Parser
from lowbit_core.log import configure_logging
from lowbit_core.manifest import read_manifest
from lowbit_recover import compose_cli, distill_cli

HERE = Path(__file__).resolve().parent


def result_of(checkpoints: Sequence[Path]) -> dict[str, Any]:
    """What the steps in these directories say, the last of which has the records of all."""
    found = [manifest for one in checkpoints if (manifest := read_manifest(one)) is not None]
    last = found[-1]
    assert len(found) == len(checkpoints) == len(last.steps), "a directory for each step"
    return {
        "base": last.base.name,
        "base_bytes": last.size.base_bytes,
        "heldout": last.quality.heldout.model_dump(include={"num_samples", "max_seq_length", "sha256"}),
        "steps": [one.model_dump(mode="json", exclude={"identity"}) for one in last.steps],
        "domains": [
            {name: values["mean_kld"] for name, values in one.quality.domains.items()} for one in found
        ],
        "top1_agreement": [one.quality.top1_agreement for one in found],
        "peak_rss_bytes": [one.run.peak_rss_bytes for one in found],
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "versions": versions(Path(sys.executable)),
        "revision": revision(HERE.parents[1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="of the result")
    parser.add_argument("source", type=Path, help="a checkpoint, or a file of steps")
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", nargs="+", default=[])
    parser.add_argument("--work", type=Path, required=True, help="directory for checkpoints")
    words = sys.argv[1:]
    own, flags = (
        (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    )
    arguments = parser.parse_args(own)
    out, composed = arguments.work / arguments.name, arguments.source.suffix == ".yaml"
    command = compose_cli.command if composed else distill_cli.command
    configure_logging("INFO")
    ours = Parser(prog="lowbit")
    command.add_arguments(ours)
    given = [str(arguments.source), "--model" if composed else "--base", arguments.base, "--out", str(out)]
    given += [*flags, *(["--data", *arguments.data] if arguments.data else [])]
    status = command.run(ours.read(given))
    result = result_of(sorted(out.glob("*-*/")) if composed else [arguments.source, out])
    file = HERE / "results" / f"{arguments.name}.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{file.name}: KL {[round(one['mean_kld'], 4) for one in result['steps']]}")
    sys.exit(status)


if __name__ == "__main__":
    main()
