"""The chart rendered by Helm's own SDK: valid for Kubernetes, hardened, and refusing wrong values."""

import argparse
import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

from lowbit_server.cli import command as serve
from lowbit_server.cli import config_from
from lowbit_server.config import ServeConfig

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm"
EXAMPLES = {
    name: yaml.safe_load((CHART / "ci" / f"{name}-values.yaml").read_text()) for name in ("cpu", "gpu")
}

Resource = dict[str, Any]


def merged(values: Resource, changes: Resource) -> Resource:
    """`values` with `changes` laid over, key by key; neither is changed."""
    result = copy.deepcopy(values)
    for key, change in changes.items():
        old = result.get(key)
        result[key] = merged(old, change) if isinstance(old, dict) and isinstance(change, dict) else change
    return result


def render(example: str = "cpu", **changes: Any) -> dict[str, Resource]:
    """The resources by kind."""
    with helm_python.Chart.load(CHART) as chart:
        files = chart.render(merged(EXAMPLES[example], changes), name="demo", namespace="models")
    texts = [text for path, text in files.items() if path.endswith(".yaml") and text.strip()]
    return {resource["kind"]: resource for resource in map(yaml.safe_load, texts)}


def pod(resources: dict[str, Resource]) -> Resource:
    spec: Resource = resources["Deployment"]["spec"]["template"]["spec"]
    return spec


def container(resources: dict[str, Resource]) -> Resource:
    (only,) = pod(resources)["containers"]
    return only  # type: ignore[no-any-return]


@pytest.mark.parametrize("example", EXAMPLES)
def test_chart_lints_without_warnings(example: str) -> None:
    report = helm_python.lint(CHART, EXAMPLES[example], strict=True)
    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize("version", ["1.25", "1.28", "1.31", "1.34", "1.37"])
@pytest.mark.parametrize("example", EXAMPLES)
def test_resources_are_strictly_valid_for_kubernetes(example: str, version: str) -> None:
    resources = render(example)
    resources.pop("ServiceMonitor", None)  # the operator's CRD has no schema there
    assert set(resources) == {"Deployment", "Service", "ServiceAccount"}
    for resource in resources.values():
        assert kubernetes_validate.validate(resource, version, strict=True) == version


@pytest.mark.parametrize("example", EXAMPLES)
def test_lowbit_serve_reads_the_rendered_arguments_as_meant(example: str) -> None:
    changes = {"server": {"servedModelName": "a name", "maxModelLen": 1048576, "kvCacheGib": 1.5}}
    name, *arguments = container(render(example, **changes))["args"]
    assert name == "serve"
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    assert config_from(parser.parse_args(arguments)) == ServeConfig(
        directory=Path("/checkpoint"),
        host="0.0.0.0",
        port=8000,
        served_model_name="a name",
        max_model_len=1048576,
        kv_cache_memory_bytes=3 << 29,
        tensor_parallel_size=EXAMPLES[example].get("gpu", {"count": 1})["count"],
        drain_timeout_s=EXAMPLES[example]["server"].get("drainTimeoutS", 60),
    )


def test_flags_left_null_are_left_to_the_server() -> None:
    arguments = container(render(server={"kvCacheGib": None}))["args"]
    assert arguments == [
        *("serve", "/checkpoint", "--host=0.0.0.0", "--port=8000"),
        *("--drain-timeout-s=60", "--tensor-parallel-size=1"),
    ]


def test_gpus_are_limited_and_split_the_model() -> None:
    server = container(render("gpu"))
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert "--tensor-parallel-size=2" in server["args"]
    assert "nvidia.com/gpu" not in container(render("cpu"))["resources"]["limits"]


def test_pod_meets_the_restricted_security_standard() -> None:
    resources = render()
    security, server = pod(resources)["securityContext"], container(resources)["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert server == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod(resources)["automountServiceAccountToken"] is False
    assert resources["ServiceAccount"]["automountServiceAccountToken"] is False


def test_only_emptydirs_are_writable_and_every_mount_has_its_volume() -> None:
    resources = render("gpu")
    volumes = {volume.pop("name"): volume for volume in pod(resources)["volumes"]}
    mounts = {mount["name"]: mount for mount in container(resources)["volumeMounts"]}
    assert mounts.keys() == volumes.keys()
    writable = {name for name, mount in mounts.items() if not mount.get("readOnly")}
    assert writable == {name for name, volume in volumes.items() if "emptyDir" in volume}
    assert mounts["checkpoint"] == {
        "name": "checkpoint",
        "mountPath": "/checkpoint",
        "readOnly": True,
        "subPath": "qwen3-30b-a3b",
    }
    assert volumes["checkpoint"]["persistentVolumeClaim"] == {"claimName": "checkpoints", "readOnly": True}


def test_probes_ask_the_right_path_and_startup_has_the_whole_budget() -> None:
    server = container(render(startup={"budgetS": 901}))
    paths = {kind: server[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/livez"}
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 905


def test_service_and_monitor_select_the_pods() -> None:
    resources = render("gpu")
    labels = resources["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    assert resources["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels
    assert resources["Service"]["spec"]["selector"].items() <= labels
    monitor = resources["ServiceMonitor"]
    assert (
        monitor["spec"]["selector"]["matchLabels"].items()
        <= resources["Service"]["metadata"]["labels"].items()
    )
    assert monitor["spec"]["endpoints"] == [{"port": "http", "path": "/metrics", "interval": "15s"}]
    assert "ServiceMonitor" not in render("cpu")


def test_kubernetes_adds_no_variable_that_serve_would_read_as_a_flag() -> None:
    # A service named lowbit would set LOWBIT_PORT=tcp://… in every pod, and `lowbit serve` reads LOWBIT_PORT.
    assert pod(render())["enableServiceLinks"] is False


def test_image_is_a_version_or_a_digest() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert container(render())["image"] == f"lowbit:{version}-cpu"
    assert container(render(gpu={"count": 1}))["image"] == f"lowbit:{version}-gpu"
    assert container(render(image={"tag": "1.2"}))["image"] == "lowbit:1.2"
    assert container(render("gpu", image={"tag": "1.2"}))["image"].startswith("lowbit@sha256:")


def test_grace_period_just_long_enough_is_accepted() -> None:
    assert pod(render(shutdown={"terminationGracePeriodS": 71}))["terminationGracePeriodSeconds"] == 71


WRONG = [
    (
        {"shutdown": {"terminationGracePeriodS": 70}},
        "is 70 and must exceed .*preStopS 10 .*drainTimeoutS 60 = 70",
    ),
    ({"server": {"drainTimeoutS": 600}}, "preStopS 10 .*drainTimeoutS 600 = 610: .*set at least 620"),
    ({"image": {"tag": "latest"}}, "image.tag is latest"),
    ({"image": {"repository": "lowbit:1"}}, "/image/repository.*does not match pattern"),
    ({"image": {"digest": "sha256:12"}}, "/image/digest.*does not match pattern"),
    ({"rollout": {"maxSurge": 0}}, "both 0: no pod could ever be replaced"),
    ({"checkpoint": {"existingClaim": None}}, "/checkpoint/existingClaim.*got null, want string"),
    ({"resources": {"limits": None}}, "/resources/limits.*got null, want object"),
    ({"resources": {"limits": {"memory": "8 GB"}}}, "/resources/limits/memory.*does not match pattern"),
    ({"gpu": {"count": -1}}, "/gpu/count.*minimum: got -1, want 0"),
    ({"server": {"maxModelLength": 2048}}, "/server.*additional properties 'maxModelLength' not allowed"),
    ({"replicaCount": 2}, "additional properties 'replicaCount' not allowed"),
    ({"replicas": "two"}, "/replicas.*got string, want integer"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_values_are_refused_with_their_path(changes: Resource, message: str) -> None:
    with pytest.raises(helm_python.HelmError, match=f"(?s){message}"):
        render(**changes)


def test_defaults_alone_are_refused_with_what_is_missing() -> None:
    with helm_python.Chart.load(CHART) as chart, pytest.raises(helm_python.HelmValuesError) as raised:
        chart.render()
    assert "at '/checkpoint': missing property 'existingClaim'" in str(raised.value)
    assert "at '/resources': missing properties 'requests', 'limits'" in str(raised.value)


def test_schema_refuses_unknown_keys_everywhere_and_knows_every_default() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    open_objects = []

    def visit(node: Any, path: str) -> None:
        if isinstance(node, dict):
            if node.get("type") == "object" and node.get("additionalProperties") not in (
                False,
                {"type": "string"},
            ):
                open_objects.append(path)
            for key, child in node.items():
                visit(child, f"{path}/{key}")

    visit(schema, "")
    assert open_objects == ["/properties/global"]
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    assert defaults.keys() == schema["properties"].keys() - {"global"}
