"""The chart rendered by Helm's own SDK, for every test of this directory."""

import copy
from pathlib import Path
from typing import Any

import helm_python
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm"
Resource = dict[str, Any]
EXAMPLES: dict[str, Resource] = {
    path.name.removesuffix("-values.yaml"): yaml.safe_load(path.read_text())
    for path in sorted((CHART / "ci").glob("*-values.yaml"))
}


def merged(values: Resource, changes: Resource) -> Resource:
    """`values` with `changes` laid over, key by key; neither is changed."""
    result = copy.deepcopy(values)
    for key, change in changes.items():
        old = result.get(key)
        result[key] = merged(old, change) if isinstance(old, dict) and isinstance(change, dict) else change
    return result


def render(example: str = "cpu", **changes: Any) -> dict[str, Resource]:
    """The resources by kind; of two, one is named `Dashboard` or `JobsPolicy`."""
    with helm_python.Chart.load(CHART) as chart:
        files = chart.render(merged(EXAMPLES[example], changes), name="demo", namespace="models")
    found: dict[str, Resource] = {}
    for path, text in files.items():
        if path.endswith(".yaml") and text.strip():
            resource = yaml.safe_load(text)
            kind = {"dashboard": "Dashboard", "networkpolicy-jobs": "JobsPolicy"}.get(
                Path(path).stem, resource["kind"]
            )
            assert kind not in found
            found[kind] = resource
    return found


def pod(resources: dict[str, Resource]) -> Resource:
    spec: Resource = resources["Deployment"]["spec"]["template"]["spec"]
    return spec


def container(resources: dict[str, Resource]) -> Resource:
    server: Resource = pod(resources)["containers"][0]
    assert server["name"] == "server"
    return server


def settings(resources: dict[str, Resource]) -> dict[str, str]:
    """The server's LOWBIT_ variables."""
    data: dict[str, str] = resources["ConfigMap"]["data"]
    return data
