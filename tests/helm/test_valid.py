"""Every example renders, lints, and is strictly valid for Kubernetes and for the CRDs that it uses.

crds/ holds the schemas of five CRDs without their descriptions and with unknown fields forbidden, from the main
branches of August 2026: Gateway API's standard channel (4564255ac), KEDA after 2.20.1 (8b4f083ca), the Prometheus
operator after 0.93.0 (6adcebc50), LeaderWorkerSet after 0.10.0 (060ab4da1). All are Apache-2.0. The pods of a
LeaderWorkerSet are left out of its schema: they are validated as pods, for each Kubernetes.
"""

import json
from pathlib import Path

import helm_python
import jsonschema
import kubernetes_validate
import pytest
from tests.helm.chart import CHART, EXAMPLES, Resource, render, templates
from tests.helm.test_clusters import CORPORATE, LOADTEST, PLACED

CRDS = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "crds").glob("*.json")}
VERSIONS = [f"1.{minor}" for minor in range(30, 38)]
HPA: Resource = {"autoscaling": {"mode": "hpa", "minReplicas": 2}}
HUB: Resource = {"checkpoint": {"existingClaim": "", "hub": {"id": "a/b@c", "existingSecret": "hub"}}}
VARIANTS: list[tuple[str, Resource]] = [
    *((name, {}) for name in EXAMPLES),
    ("autoscaled", HPA),
    ("one-gpu", {"quantize": {"pods": 2}}),
    ("cpu", HUB | CORPORATE | PLACED | {"loadtest": LOADTEST, "hostNetwork": True}),
]
# Image volumes came with Kubernetes 1.31.
FITTING = [
    (*variant, v) for variant in VARIANTS for v in VERSIONS if (variant[0], v) != ("four-gpus", "1.30")
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_chart_lints_without_warnings(example: str) -> None:
    report = helm_python.lint(CHART, EXAMPLES[example], strict=True)
    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize(("example", "changes", "version"), FITTING)
def test_resources_are_strictly_valid_for_kubernetes(example: str, changes: Resource, version: str) -> None:
    for kind, resource in render(example, **changes).items():
        if kind not in CRDS:
            assert kubernetes_validate.validate(resource, version, strict=True) == version


@pytest.mark.parametrize("version", VERSIONS)
def test_pods_of_a_group_are_strictly_valid_for_kubernetes(version: str) -> None:
    for template in templates(render("multi-node", quantize=EXAMPLES["one-gpu"]["quantize"])):
        pod = {"apiVersion": "v1", "kind": "Pod"} | template
        assert kubernetes_validate.validate(pod, version, strict=True) == version


@pytest.mark.parametrize("example", EXAMPLES)
def test_custom_resources_are_strictly_valid_for_their_crds(example: str) -> None:
    for kind, resource in render(example).items():
        if kind in CRDS:
            jsonschema.Draft202012Validator(CRDS[kind]).validate(resource)


def test_examples_use_every_kind_that_the_chart_has() -> None:
    kinds = {kind for example, changes in VARIANTS for kind in render(example, **changes)}
    assert kinds == {
        *("ConfigMap", "Dashboard", "Deployment", "HorizontalPodAutoscaler", "HTTPRoute", "Ingress", "Job"),
        *("JobsPolicy", "LeaderWorkerSet", "LoadTest", "NodesPolicy", "Peers", "RanksPolicy"),
        *("NetworkPolicy", "Pod", "PodDisruptionBudget", "PrometheusRule", "ScaledObject", "Secret"),
        *("Service", "ServiceAccount", "ServiceMonitor"),
    }


@pytest.mark.parametrize("kind", CRDS)
def test_a_crd_refuses_an_unknown_field(kind: str) -> None:
    resource = (render("autoscaled") | render("multi-node"))[kind]
    resource["spec"]["unknownField"] = 1
    with pytest.raises(jsonschema.ValidationError, match="unknownField"):
        jsonschema.Draft202012Validator(CRDS[kind]).validate(resource)
