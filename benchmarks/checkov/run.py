"""checkov on every example of the chart: no check may fail, and every skip must say why.

It needs an environment of its own (`pip install checkov==3.3.30`) beside the project's, which renders:

    python benchmarks/checkov/run.py --checkov ENVIRONMENT/bin/checkov --json benchmarks/checkov/results/chart.json

checkov knows no LeaderWorkerSet, so the pods of a group are handed to it as pods.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.helm.chart import EXAMPLES, Resource, render, templates
from tests.helm.test_clusters import LOADTEST

# What no example switches on.
MORE: dict[str, Resource] = {"autoscaled": {"loadtest": LOADTEST}}


def main() -> int:
    """0 where nothing failed and every skip has its reason."""
    arguments = parse_arguments()
    results = {example: scan(arguments.checkov, example) for example in EXAMPLES}
    for example, result in results.items():
        counts = result["passed"], len(result["failed"]), sum(result["skipped"].values())
        print("{:<12}{:>5} passed {:>3} failed {:>3} skipped".format(example, *counts))
        for failure in result["failed"]:
            print(f"  FAILED {failure}")
    reasons = {reason for result in results.values() for reason in result["skipped"]}
    for reason in sorted(reasons):
        print(f"  skipped: {reason}")
    if arguments.json:
        version = subprocess.run([arguments.checkov, "--version"], capture_output=True, text=True, check=True)
        report = {"checkov": version.stdout.strip(), "examples": results}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    unexplained = [reason for reason in reasons if not reason.partition(": ")[2]]
    return 1 if unexplained or any(result["failed"] for result in results.values()) else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkov", default="checkov", metavar="FILE", help="the command, in its own environment"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts here")
    return parser.parse_args()


def scan(checkov: str, example: str) -> dict[str, Any]:
    """Counts of one example: passed, the failed ones, and the skipped ones by check and reason."""
    with tempfile.TemporaryDirectory() as folder:
        for name, resource in manifests(example).items():
            (Path(folder) / f"{name}.yaml").write_text(yaml.safe_dump(resource))
        command = [
            checkov,
            "--directory",
            folder,
            "--framework",
            "kubernetes",
            "--skip-download",
            "--output",
            "json",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)["results"]
    skipped: dict[str, int] = {}
    for check in found["skipped_checks"]:
        reason = f"{check['check_id']}: {check['check_result'].get('suppress_comment', '')}"
        skipped[reason] = skipped.get(reason, 0) + 1
    failed = [
        f"{check['check_id']} {check['resource']}: {check['check_name']}" for check in found["failed_checks"]
    ]
    return {"passed": len(found["passed_checks"]), "failed": failed, "skipped": skipped}


def manifests(example: str) -> dict[str, Resource]:
    """What an example installs, by a name for its file."""
    resources = render(example, **MORE.get(example, {}))
    group = resources.pop("LeaderWorkerSet", None)
    if group is None:
        return resources
    pods = {}
    for number, template in enumerate(templates({"LeaderWorkerSet": group})):
        name = {
            "name": f"{group['metadata']['name']}-0-{number}",
            "namespace": group["metadata"]["namespace"],
        }
        metadata = template["metadata"] | name
        pods[f"pod-{number}"] = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": metadata,
            "spec": template["spec"],
        }
    return resources | pods


if __name__ == "__main__":
    sys.exit(main())
