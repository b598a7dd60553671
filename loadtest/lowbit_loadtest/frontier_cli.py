"""`lowbit frontier PLAN.yaml`: which checkpoint should be served on this machine?

Writes frontier.json, frontier.md and frontier.html into --out. The last line on stdout is one JSON object. Exit status
0: a checkpoint is recommended, or some are equal; 1: the data cannot decide, nothing meets the constraints, or a
checkpoint could not be served; 2: wrong input; 130: interrupted, with a report of what was measured, and the same
command goes on.
"""

import argparse
import json
import signal
import sys
from typing import Any

from lowbit_core.cli import Command, file_path
from lowbit_core.errors import ConfigError
from lowbit_core.log import get_logger
from lowbit_loadtest.frontier.decide.document import decided_document
from lowbit_loadtest.frontier.decide.evidence import Evidence
from lowbit_loadtest.frontier.document import as_document
from lowbit_loadtest.frontier.page import as_html, as_markdown
from lowbit_loadtest.frontier.plan import FrontierPlan, load_plan
from lowbit_loadtest.frontier.run import Interrupted, OutputDirectory, run_decision, run_frontier
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
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a plan's key: decide.within=30m",
    )
    parser.add_argument(
        "--report-only", action="store_true", help="serve nothing: report on the runs that are in --out"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure a plan and write its reports; returns the exit status."""
    plan = load_plan(arguments.plan, tuple(arguments.set))
    out = OutputDirectory(arguments.out or arguments.plan.with_suffix(".d"))
    failures: dict[str, str] = {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a server that we started must not outlive us
    try:
        if not arguments.report_only:
            with progress() as on_run:
                if plan.decide:
                    run_decision(plan, out, on_run)
                else:
                    failures = run_frontier(plan, out, on_run)
    except (KeyboardInterrupt, Interrupted):
        document = _write(plan, out, failures)
        log.info(
            "interrupted%s; the same command goes on", "" if document else " before anything was measured"
        )
        return 130
    document = _write(plan, out, failures)
    if document is None:
        raise ConfigError(f"{out.root} has no finished runs to report on")
    sys.stdout.write(json.dumps({key: document[key] for key in ("kind", "recommendation", "pareto")}) + "\n")
    decided = document["recommendation"]["verdict"] in ("recommended", "equal")
    return 0 if decided and not document["failures"] else 1


def _write(plan: FrontierPlan, out: OutputDirectory, failures: dict[str, str]) -> dict[str, Any] | None:
    document = _document(plan, out, failures)
    if document is None:
        return None
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
    (out.root / "frontier.json").write_text(text, encoding="utf-8")
    (out.root / "frontier.md").write_text(as_markdown(document), encoding="utf-8")
    (out.root / "frontier.html").write_text(as_html(document), encoding="utf-8")
    for line in document["recommendation"]["reasons"]:
        log.info(line)
    log.info("report: %s", out.root / "frontier.html")
    return document


def _document(plan: FrontierPlan, out: OutputDirectory, failures: dict[str, str]) -> dict[str, Any] | None:
    if plan.decide:
        steps = out.steps()
        return decided_document(plan, Evidence(plan, steps)) if steps else None
    runs = out.runs(plan)
    return as_document(plan, runs, failures) if runs else None


command = Command(
    help="Compare checkpoints on this machine: throughput against quality, with a recommendation.",
    add_arguments=add_arguments,
    run=run,
)
