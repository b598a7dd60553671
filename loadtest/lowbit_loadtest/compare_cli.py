"""`lowbit compare A.json B.json`: is B better, worse or the same as A, or can the data not say?

Exit status 0: nothing is worse; 1: something is, or a side completed no request (with --strict also: something is
undecided); 2: input refused. The last line on stdout is one JSON object.
"""

import argparse
import json
import sys

from lowbit_core.cli import Command, file_path
from lowbit_core.errors import ConfigError
from lowbit_core.log import get_logger
from lowbit_loadtest.compare.comparison import COMPLETED_TOLERANCE, compare
from lowbit_loadtest.compare.page import as_html
from lowbit_loadtest.compare.reading import READABLE, read_result
from lowbit_loadtest.compare.text import as_document, lines

log = get_logger("compare")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", type=file_path, help=f"the baseline: {READABLE}")
    parser.add_argument(
        "b", metavar="B", type=file_path, help="the result that is judged, of any of these tools"
    )
    parser.add_argument(
        "--tolerance",
        type=_share,
        default=0.05,
        metavar="SHARE",
        help="differences below it do not count (0.05)",
    )
    parser.add_argument(
        "--completed-tolerance",
        type=_share,
        default=COMPLETED_TOLERANCE,
        metavar="SHARE",
        help=f"the same for the share of requests that completed ({COMPLETED_TOLERANCE:g})",
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 also when a metric is undecided")
    parser.add_argument(
        "--allow-invalid", action="store_true", help="compare although a generator fell behind"
    )
    parser.add_argument("--html", metavar="FILE.html", type=file_path, help="write a page with charts")


def run(arguments: argparse.Namespace) -> int:
    """Compare two files; returns the exit status."""
    if arguments.html is not None and (arguments.html.is_dir() or not arguments.html.parent.is_dir()):
        raise ConfigError(
            f"--html {arguments.html} cannot be written: give a file in a directory that exists"
        )
    a, b = (read_result(path, arguments.allow_invalid) for path in (arguments.a, arguments.b))
    comparison = compare(a, b, arguments.tolerance, arguments.completed_tolerance)
    for line in lines(comparison):
        log.info(line)
    names = str(arguments.a), str(arguments.b)
    tolerances = {"tolerance": arguments.tolerance, "completed_tolerance": arguments.completed_tolerance}
    if arguments.html is not None:
        arguments.html.write_text(as_html(comparison, names, tolerances), encoding="utf-8")
    sys.stdout.write(json.dumps(as_document(comparison, names, tolerances)) + "\n")
    fine = ("better", "same") if arguments.strict else ("better", "same", "undecided")
    return 0 if {comparison.verdict, *comparison.verdicts} <= set(fine) else 1


command = Command(
    help="Compare two load test results, of any tool: better, worse, same or undecided, with intervals.",
    add_arguments=add_arguments,
    run=run,
)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share such as 0.05")
    return value
