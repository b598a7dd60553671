"""`lowbit compare A.json B.json`: is B better, worse or the same as A, or can the data not say?

Exit status 0: nothing is worse; 1: something is (with --strict also: something is undecided); 2: input refused.
The last line on stdout is one JSON object.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowbit_core.cli import Command, file_path
from lowbit_core.errors import ConfigError
from lowbit_core.log import get_logger
from lowbit_loadtest.compare import Comparison, Difference, compare
from lowbit_loadtest.report.document import FORMAT_VERSION

log = get_logger("compare")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "a", metavar="A.json", type=file_path, help="result of lowbit loadtest --json: the baseline"
    )
    parser.add_argument("b", metavar="B.json", type=file_path, help="the result that is judged")
    parser.add_argument(
        "--tolerance",
        type=_share,
        default=0.05,
        metavar="SHARE",
        help="differences below it do not count (0.05)",
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 also when a metric is undecided")
    parser.add_argument(
        "--allow-invalid", action="store_true", help="compare although a generator fell behind"
    )


def run(arguments: argparse.Namespace) -> int:
    """Compare two files; returns the exit status."""
    a, b = (_read(path, arguments.allow_invalid) for path in (arguments.a, arguments.b))
    comparison = compare(a, b, arguments.tolerance)
    for line in lines(comparison):
        log.info(line)
    sys.stdout.write(json.dumps(_document(comparison, arguments)) + "\n")
    bad = ("worse", "undecided") if arguments.strict else ("worse",)
    return 1 if any(one.verdict in bad for one in comparison.differences) else 0


command = Command(
    help="Compare two load test results: better, worse, same or undecided, with intervals.",
    add_arguments=add_arguments,
    run=run,
)


def lines(comparison: Comparison) -> list[str]:
    """The comparison for people."""
    how = "paired by request" if comparison.paired else "not paired: the scenarios or seeds differ"
    rows = [_row(one) for one in comparison.differences]
    return [f"B against A, {how}; 95 % intervals, each for itself", *rows, f"verdict: {comparison.verdict}"]


def _row(one: Difference) -> str:
    at = f" at {one.offered_rps:.3g} requests/s" if one.offered_rps else ""
    spread = f" [{one.interval.low:+.1%} to {one.interval.high:+.1%}]" if one.interval else " (no interval)"
    return f"{one.metric + at:<48} {one.a:.4g} to {one.b:.4g}  {one.change:+.1%}{spread}  {one.verdict}"


def _document(comparison: Comparison, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "kind": "lowbit.compare",
        "a": str(arguments.a),
        "b": str(arguments.b),
        "tolerance": arguments.tolerance,
        "verdict": comparison.verdict,
        **asdict(comparison),
    }


def _read(path: Path, allow_invalid: bool) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict) or document.get("kind") != "lowbit.loadtest":
        raise ConfigError(f"{path} is not a result of lowbit loadtest")
    if document.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            f"{path} has format {document.get('format_version')}, this version reads {FORMAT_VERSION}"
        )
    if any("request_table" not in point for point in document["points"]):
        raise ConfigError(f"{path} has no requests; give the file that --json wrote, not stdout")
    if not document["valid"] and not allow_invalid:
        raise ConfigError(
            f"{path} is invalid ({'; '.join(document['invalid_because'])}); run it again on an idle machine, "
            "or give --allow-invalid"
        )
    return document


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share such as 0.05")
    return value
