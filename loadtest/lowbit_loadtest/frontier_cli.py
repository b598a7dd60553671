"""`lowbit frontier PLAN.yaml`: which checkpoint should be served on this machine?

Writes frontier.json, frontier.md and frontier.html into --out. The last line on stdout is one JSON object. Exit status
0: a checkpoint is recommended; 1: the data cannot decide, nothing meets the constraints, or a checkpoint could not be
served; 2: wrong input; 130: interrupted, with a report of the finished runs, and the same command goes on.
"""

import argparse
import json
import signal
import sys
from typing import Any

from lowbit_core.cli import Command, file_path
from lowbit_core.errors import ConfigError
from lowbit_core.log import get_logger
from lowbit_loadtest.frontier.document import as_document
from lowbit_loadtest.frontier.page import as_html, as_markdown
from lowbit_loadtest.frontier.plan import FrontierPlan, load_plan
from lowbit_loadtest.frontier.run import Interrupted, OutputDirectory, run_frontier
from lowbit_loadtest.report.progress import progress

log = get_logger("frontier")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "plan", metavar="PLAN.yaml", type=file_path, help="checkpoints, scenarios and constraints"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=file_path,
        help="results; a run that was stopped goes on here (default: PLAN.d)",
    )
    parser.add_argument(
        "--report-only", action="store_true", help="serve nothing: report on the runs that are in --out"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure a plan and write its reports; returns the exit status."""
    plan = load_plan(arguments.plan)
    out = OutputDirectory(arguments.out or arguments.plan.with_suffix(".d"))
    failures: dict[str, str] = {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a server that we started must not outlive us
    try:
        if not arguments.report_only:
            with progress() as on_run:
                failures = run_frontier(plan, out, on_run)
    except (KeyboardInterrupt, Interrupted):
        document = _write(plan, out, failures)
        log.info(
            "interrupted after %d runs; the same command goes on",
            len(document["runs"]) if document else 0,
        )
        return 130
    document = _write(plan, out, failures)
    if document is None:
        raise ConfigError(f"{out.root} has no finished runs to report on")
    sys.stdout.write(json.dumps({key: document[key] for key in ("kind", "recommendation", "pareto")}) + "\n")
    return 0 if document["recommendation"]["verdict"] == "recommended" and not failures else 1


def _write(plan: FrontierPlan, out: OutputDirectory, failures: dict[str, str]) -> dict[str, Any] | None:
    runs = out.runs(plan)
    if not runs:
        return None
    document = as_document(plan, runs, failures)
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
    (out.root / "frontier.json").write_text(text, encoding="utf-8")
    (out.root / "frontier.md").write_text(as_markdown(document), encoding="utf-8")
    (out.root / "frontier.html").write_text(as_html(document), encoding="utf-8")
    for line in document["recommendation"]["reasons"]:
        log.info(line)
    log.info("report: %s", out.root / "frontier.html")
    return document


command = Command(
    help="Compare checkpoints on this machine: throughput against quality, with a recommendation.",
    add_arguments=add_arguments,
    run=run,
)
