"""The chart rendered by Helm's own SDK, for every test of this directory."""

import argparse
import copy
from pathlib import Path
from typing import Any

import helm_python
import yaml

from lowbit_core.cli import Command
from lowbit_server.cli import add_serve_arguments, config_from
from lowbit_server.config import ServeConfig

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm"
Resource = dict[str, Any]
EXAMPLES: dict[str, Resource] = {
    path.name.removesuffix("-values.yaml"): yaml.safe_load(path.read_text())
    for path in sorted((CHART / "ci").glob("*-values.yaml"))
}

SECOND = {
    "loadtest-job": "LoadTest",
    "dashboard": "Dashboard",
    "networkpolicy-jobs": "JobsPolicy",
    "networkpolicy-nodes": "NodesPolicy",
    "networkpolicy-ranks": "RanksPolicy",
    "quantize-peers": "Peers",
}


def merged(values: Resource, changes: Resource) -> Resource:
    """`values` with `changes` laid over, key by key; neither is changed."""
    result = copy.deepcopy(values)
    for key, change in changes.items():
        old = result.get(key)
        result[key] = merged(old, change) if isinstance(old, dict) and isinstance(change, dict) else change
    return result


def render(example: str = "cpu", **changes: Any) -> dict[str, Resource]:
    """The resources by kind, the second of a kind by its name in `SECOND`."""
    return release(merged(EXAMPLES[example], changes))


def release(values: Resource, name: str = "demo", namespace: str = "models") -> dict[str, Resource]:
    """As `render`, of these values alone and for any release."""
    with helm_python.Chart.load(CHART) as chart:
        files = chart.render(values, name=name, namespace=namespace)
    found: dict[str, Resource] = {}
    for path, text in files.items():
        if path.endswith(".yaml") and text.strip():
            resource = yaml.safe_load(text)
            kind = SECOND.get(Path(path).stem, resource["kind"])
            assert kind not in found
            found[kind] = resource
    return found


def templates(resources: dict[str, Resource]) -> list[Resource]:
    """The pod templates that serve: of the Deployment, or of the leader and the followers."""
    if "Deployment" in resources:
        return [resources["Deployment"]["spec"]["template"]]
    group = resources["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    return [group["leaderTemplate"], group["workerTemplate"]]


def pod(resources: dict[str, Resource]) -> Resource:
    spec: Resource = templates(resources)[0]["spec"]
    return spec


def container(resources: dict[str, Resource]) -> Resource:
    server: Resource = pod(resources)["containers"][0]
    assert server["name"] == "server"
    return server


def settings(resources: dict[str, Resource]) -> dict[str, str]:
    """The server's LOWBIT_ variables."""
    data: dict[str, str] = resources["ConfigMap"]["data"]
    own = {entry["name"]: entry.get("value", "") for entry in container(resources)["env"]}
    return data | {name: value for name, value in own.items() if name.startswith("LOWBIT_")}


def parsed(environment: dict[str, str]) -> ServeConfig:
    """The server's settings out of a pod's environment."""
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser, environment)
    return config_from(parser.parse_args([]))


def parse(command: Command, arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)
