"""Does the working tree quantize to the same bytes as an older revision, and for no more CPU seconds and memory?

    python benchmarks/same_bytes.py OLD_REVISION [--only SUBSTRING] [--skip-demo] [--json FILE]
    python benchmarks/same_bytes.py OLD_REVISION --pairs 5 [--recipe awq-g64] [--json FILE]

The first quantizes tiny models of five kinds of family by every bundled recipe that fits, with small texts and groups
of 32, and the demo model by awq-g64 and gptq-g64, once with each revision, on the same machine with the same threads,
and compares every shard tensor by tensor; it ends with status 1 when anything differs. Each revision runs its own
recipes of these names. Recipes of the older formats that the working tree has no more are made by `lowbit export`.

The second quantizes the demo model in pairs, old and new in turn, and prints ratios. The machine should be idle then.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.quantizers.provenance import hardware, versions
from benchmarks.revisions.cases import DEMO, DEMO_RECIPES, Case, demo_cases, tiny_cases
from benchmarks.revisions.comparison import Compared, compared
from benchmarks.revisions.pairs import as_json, fewer, measured_pairs
from benchmarks.revisions.trees import Ended, Tree, two_trees
from scripts.demo import find_demo_model

WRITE_TINY = """
import sys; from pathlib import Path; from tests.tiny_models import write_tiny_model
for family in sys.argv[2:]: write_tiny_model(Path(sys.argv[1]) / family, family)
"""
SHOWN = 3  # differing tensors of a case that the table names


@dataclass(frozen=True)
class Made:
    """How a case ended with one revision, and where its checkpoint lies."""

    ended: Ended
    out: Path


def main() -> int:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(dir=arguments.work) as temporary:
        work = Path(temporary)
        trees = two_trees(arguments.old, work)
        facts = _facts(trees)
        print(json.dumps(facts), file=sys.stderr)
        found, held = (_pairs if arguments.pairs else _bytes)(trees, work, arguments)
    result = {**facts, **found}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0 if held else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/same_bytes.py", description="The working tree against an older revision."
    )
    parser.add_argument("old", metavar="OLD_REVISION", help="what git calls it, e.g. ca07873")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="cases whose name holds it")
    parser.add_argument("--skip-demo", action="store_true", help="tiny models only: a few minutes")
    parser.add_argument("--pairs", type=int, default=0, metavar="N", help="measure N pairs of runs instead")
    parser.add_argument(
        "--recipe", action="append", help=f"of --pairs (default: {' and '.join(DEMO_RECIPES)})"
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="of --pairs: N calibration and N held-out sequences"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where temporary files go (1 GB)")
    return parser.parse_args()


def _facts(trees: tuple[Tree, Tree]) -> dict[str, Any]:
    """On which machine, with how many threads, which revisions."""
    return {
        "hardware": hardware(),
        "threads": int(trees[0].environment["OMP_NUM_THREADS"]),
        "versions": versions(Path(sys.executable)),
        "revisions": {tree.name: tree.revision for tree in trees},
    }


def _pairs(
    trees: tuple[Tree, Tree], work: Path, arguments: argparse.Namespace
) -> tuple[dict[str, Any], bool]:
    model, settings = find_demo_model(), fewer(arguments.samples) if arguments.samples else ()
    found = [
        as_json(recipe, measured_pairs(trees, arguments.pairs, model, recipe, work, settings))
        for recipe in arguments.recipe or DEMO_RECIPES
    ]
    for one in found:
        for figure, ratio in one["new_over_old"].items():
            print(
                f"{one['recipe']:<10} {figure:<15} {ratio['mean']:.3f} ± {ratio['standard_error']:.3f} of the old"
            )
    return {"model": DEMO, "samples": arguments.samples, "pairs": found}, True


def _bytes(
    trees: tuple[Tree, Tree], work: Path, arguments: argparse.Namespace
) -> tuple[dict[str, Any], bool]:
    cases = [case for case in tiny_cases(trees[0]) if arguments.only in case.name]
    demo = [case for case in demo_cases() if arguments.only in case.name and not arguments.skip_demo]
    if not cases and not demo:
        raise SystemExit(f"same_bytes: no case's name holds {arguments.only!r}")
    families = sorted({case.model for case in cases})
    trees[1].python(WRITE_TINY, str(work / "models"), *families)
    models = {family: work / "models" / family for family in families}
    if demo:
        models[DEMO] = find_demo_model()
    results: list[Compared] = []
    for batch in filter(None, (cases, *([case] for case in demo))):
        results += _compare(trees, work, batch, models)
    differing = [result.name for result in results if not result.held]
    print(f"{len(results) - len(differing)} of {len(results)} cases equal")
    return {"cases": [asdict(result) for result in results], "differing": differing}, not differing


def _compare(
    trees: tuple[Tree, Tree], work: Path, cases: Sequence[Case], models: dict[str, Path]
) -> list[Compared]:
    """Run all cases with one revision, then with the other, and print a line for each."""
    old, new = (_run(tree, work / tree.name, cases, models) for tree in trees)
    results = [
        compared(case.name, (old[case].ended, new[case].ended), old[case].out, new[case].out)
        for case in cases
    ]
    for result in results:
        print(_line(result), flush=True)
    return results


def _run(tree: Tree, work: Path, cases: Sequence[Case], models: dict[str, Path]) -> dict[Case, Made]:
    """Every case's checkpoint by one revision; a case whose first command fails has failed."""
    outs = [work / case.name.replace(" ", "-") for case in cases]
    commands = [case.commands(tree, models[case.model], out) for case, out in zip(cases, outs, strict=True)]
    ends = iter(tree.run([command for each in commands for command in each]))
    found = {}
    for case, each, out in zip(cases, commands, outs, strict=True):
        ended = [next(ends) for _ in each]
        found[case] = Made(next((end for end in ended if end.status != 0), ended[-1]), out)
    return found


def _line(result: Compared) -> str:
    line = f"{result.name:<42} {result.outcome:<16} {result.tensors:>5} tensors"
    if result.tensors:
        line += (
            f"  shards {'=' if result.shards_equal else '≠'}  config {'=' if result.config_equal else '≠'}"
        )
        line += f"  KL {result.mean_kld[0]} {result.mean_kld[1]}"
    details = result.said if not result.tensors else result.differs[:SHOWN]
    more = [f"… {len(result.differs)} in all"] if len(result.differs) > SHOWN else []
    return "\n    ".join([line, *details, *more])


if __name__ == "__main__":
    sys.exit(main())
