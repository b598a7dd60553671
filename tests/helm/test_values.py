"""Wrong values are refused before anything is installed, with a message that names the value."""

import json
from typing import Any

import helm_python
import pytest
import yaml
from tests.helm.chart import CHART, Resource, render

KEYS: Resource = {"existingSecret": "keys"}
QUANTIZE: Resource = {"enabled": True, "model": "Qwen/Qwen3-8B"}
RESOURCES: Resource = {"requests": {"cpu": 1, "memory": "1Gi"}, "limits": {"memory": "1Gi"}}

BY_SCHEMA: list[tuple[Resource, str]] = [
    ({"image": {"repository": "lowbit:1"}}, "/image/repository.*does not match pattern"),
    ({"image": {"digest": "sha256:12"}}, "/image/digest.*does not match pattern"),
    ({"image": {"pullPolicy": "Sometimes"}}, "/image/pullPolicy.*one of 'IfNotPresent', 'Always', 'Never'"),
    ({"checkpoint": {"existingClaim": "My_Claim"}}, "/checkpoint/existingClaim.*does not match pattern"),
    ({"checkpoint": {"path": "../other"}}, "/checkpoint/path.*does not match pattern"),
    ({"checkpoint": {"path": "/absolute"}}, "/checkpoint/path.*does not match pattern"),
    ({"checkpoint": {"sizeGib": 0}}, "/checkpoint/sizeGib.*minimum: got 0, want 1"),
    ({"checkpoint": {"image": {"reference": "ckpt:latest"}}}, "/checkpoint/image/reference.*'not' failed"),
    ({"checkpoint": {"image": {"reference": "ckpt"}}}, "/checkpoint/image/reference.*not match pattern"),
    ({"checkpoint": {"hub": {"id": "Qwen/Qwen3-8B-AWQ"}}}, "/checkpoint/hub/id.*does not match pattern"),
    ({"server": {"maxModelLength": 2048}}, "/server.*additional properties 'maxModelLength' not allowed"),
    ({"server": {"kvCacheDtype": "int8"}}, "/server/kvCacheDtype.*one of 'auto', 'fp8', 'bfloat16'"),
    ({"server": {"kvCacheGib": 0}}, "/server/kvCacheGib.*exclusiveMinimum: got 0, want 0"),
    ({"server": {"gpuMemoryUtilization": 90}}, "/server/gpuMemoryUtilization.*maximum: got 90, want 1"),
    ({"server": {"corsOrigins": ["example.org"]}}, "/server/corsOrigins/0.*does not match pattern"),
    ({"server": {"drainTimeoutS": "1m"}}, "/server/drainTimeoutS.*got string, want integer"),
    ({"server": {"enforceEager": "yes"}}, "/server/enforceEager.*got string, want boolean"),
    ({"server": {"pricePerHour": 0}}, "/server/pricePerHour.*exclusiveMinimum: got 0, want 0"),
    ({"server": {"shadow": "base:8000"}}, "/server/shadow.*does not match pattern"),
    ({"server": {"shadowShare": 5}}, "/server/shadowShare.*maximum: got 5, want 1"),
    (
        {"apiKeys": {"entries": [{"name": "a", "key": "lb-x"}]}},
        "/apiKeys/entries/0.*missing property 'sha256'",
    ),
    ({"apiKeys": {"entries": [{"name": "a", "sha256": "secret"}]}}, "/sha256.*does not match pattern"),
    ({"gpu": {"count": -1}}, "/gpu/count.*minimum: got -1, want 0"),
    ({"gpu": {"resourceName": "gpu"}}, "/gpu/resourceName.*does not match pattern"),
    ({"parallel": {"nodes": 0}}, "/parallel/nodes.*minimum: got 0, want 1"),
    ({"parallel": {"size": 2}}, "/parallel.*additional properties 'size' not allowed"),
    ({"resources": {"limits": {"hugepages": 1}}}, "/resources/limits.*'hugepages' not allowed"),
    ({"replicaCount": 2}, "additional properties 'replicaCount' not allowed"),
    ({"replicas": "two"}, "/replicas.*got string, want integer"),
    ({"resources": {"limits": None}}, "/resources/limits.*got null, want object"),
    ({"resources": {"limits": {"memory": "8 GB"}}}, "/resources/limits/memory.*does not match pattern"),
    ({"startup": {"budgetS": 5}}, "/startup/budgetS.*minimum: got 5, want 10"),
    ({"rollout": {"maxSurge": "half"}}, "/rollout/maxSurge.*does not match pattern"),
    ({"service": {"port": 70000}}, "/service/port.*maximum: got 70,?000, want 65,?535"),
    ({"quantize": {"recipe": "q4_k_m"}}, "/quantize/recipe.*one of 'awq'"),
    ({"quantize": {"model": "qwen"}}, "/quantize/model.*does not match pattern"),
    ({"quantize": {"set": ["max_kld 0.1"]}}, "/quantize/set/0.*does not match pattern"),
    ({"quantize": {"resources": {"requests": {"cpu": 1}}}}, "/quantize/resources.*missing property"),
    ({"autoscaling": {"mode": "auto"}}, "/autoscaling/mode.*one of 'none', 'hpa', 'keda'"),
    ({"autoscaling": {"kvUse": 85}}, "/autoscaling/kvUse.*maximum: got 85, want 1"),
    ({"autoscaling": {"keda": {"prometheusAddress": "prometheus:9090"}}}, "/prometheusAddress.*not match"),
    ({"networkPolicy": {"from": [{"pods": {}}]}}, "/networkPolicy/from/0.*'pods' not allowed"),
    (
        {"httpRoute": {"parentRefs": [{"kind": "Gateway"}]}},
        "/httpRoute/parentRefs/0.*missing property 'name'",
    ),
    (
        {"monitoring": {"prometheusRule": {"timeToFirstTokenS": 3}}},
        "/monitoring/prometheusRule/timeToFirstTokenS.*one of 0.25",
    ),
    ({"monitoring": {"prometheusRule": {"availability": 99}}}, "/availability.*got 99, want 1"),
    ({"sidecars": [{"name": "proxy"}]}, "/sidecars/0.*missing property 'image'"),
    (
        {"server": {"extraArgs": ["--max-num-seqs=8"]}},
        "/server.*additional properties 'extraArgs' not allowed",
    ),
    ({"podSecurityContext": {"runAsUser": 0}}, "/podSecurityContext/runAsUser.*minimum: got 0, want 1"),
    ({"podLabels": {"team": "a b"}}, "/podLabels/team.*does not match pattern"),
    ({"podAnnotations": {"a b": "c"}}, "/podAnnotations.*additional properties 'a b' not allowed"),
    ({"loadtest": {"startAt": "13:00"}}, "/loadtest/startAt.*does not match pattern"),
    ({"resources": {"limits": {"rdma/hca": 0.5}}}, "/resources/limits/rdma~1hca.*got number, want integer"),
    ({"service": {"type": "ExternalName"}}, "/service/type.*one of 'ClusterIP', 'NodePort', 'LoadBalancer'"),
    ({"tolerations": [{"effect": "Never"}]}, "/tolerations/0/effect.*one of 'NoSchedule'"),
]
BY_TEMPLATE: list[tuple[Resource, str]] = [
    (
        {"shutdown": {"terminationGracePeriodS": 90}},
        r"is 90 and must exceed .*preStopS 10 .*drainTimeoutS 60 \+ 20 .*= 90: .*set at least 100",
    ),
    (
        {"server": {"drainTimeoutS": 600}},
        r"preStopS 10 .*drainTimeoutS 600 \+ 20 .*= 630: .*set at least 640",
    ),
    ({"image": {"tag": "latest"}}, "image.tag is latest"),
    (
        {"gpu": {"count": 8}, "parallel": {"nodes": 2, "pipelineSize": 1}},
        "gpu.count 8 x parallel.nodes 2 = 16 devices, but parallel.tensorSize 8 x parallel.pipelineSize 1 = 8",
    ),
    (
        {"gpu": {"count": 4}, "parallel": {"tensorSize": 2}},
        "gpu.count 4 x parallel.nodes 1 = 4 devices, but parallel.tensorSize 2 x parallel.pipelineSize 1 = 2",
    ),
    (
        {"resources": {"limits": {"nvidia.com/gpu": 1}}},
        "resources.limits names nvidia.com/gpu; set gpu.count",
    ),
    ({"rollout": {"maxSurge": 0}}, "both 0: no pod could ever be replaced"),
    (
        {"checkpoint": {"existingClaim": ""}},
        "give existingClaim .*, image.reference .* or hub.id .*none is set",
    ),
    (
        {"checkpoint": {"image": {"reference": "a/b:1"}, "hub": {"id": "a/b@c"}}},
        "more than once: smollm2-checkpoint and a/b:1 and a/b@c; give one of existingClaim, image.reference and hub.id",
    ),
    ({"quantize": QUANTIZE}, "needs checkpoint.existingClaim and checkpoint.path"),
    ({"quantize": {"enabled": True}, "checkpoint": {"path": "a"}}, "needs quantize.model: OWNER/NAME"),
    ({"quantize": QUANTIZE, "checkpoint": {"path": "a"}}, "needs quantize.resources"),
    (
        {"apiKeys": KEYS | {"entries": [{"name": "a", "sha256": "a" * 64}]}},
        "apiKeys.existingSecret and apiKeys.entries are both set",
    ),
    (
        {"apiKeys": KEYS, "monitoring": {"serviceMonitor": {"enabled": True}}},
        "needs monitoring.scrapeKey.existingSecret",
    ),
    ({"server": {"gpuMemoryUtilization": 0.9}}, "is for GPUs and gpu.count is 0; set server.kvCacheGib"),
    ({"autoscaling": {"mode": "hpa", "minReplicas": 9}}, "minReplicas 9 is above .*maxReplicas 4"),
    ({"autoscaling": {"mode": "hpa", "minReplicas": 0}}, "0, which an HPA does not do"),
    ({"autoscaling": {"mode": "keda"}}, "needs autoscaling.keda.prometheusAddress"),
    (
        {"autoscaling": {"mode": "keda", "minReplicas": 0, "keda": {"prometheusAddress": "http://p"}}},
        "nothing would start one",
    ),
    ({"ingress": {"enabled": True}}, "ingress.enabled needs ingress.host"),
    ({"enabled": False}, "enabled is false, .*condition: lowbit.enabled"),
    ({"gpu": {"count": 1, "resourceName": "gpu.intel.com/xe"}}, "no image is known for it; set image.tag"),
    (
        {"podLabels": {"app.kubernetes.io/component": "web"}},
        "app.kubernetes.io/component, which .* selectors",
    ),
    ({"podAnnotations": {"checksum/settings": "x"}}, "checksum/settings, which the chart sets"),
    ({"extraEnv": [{"name": "LOWBIT_PORT", "value": "1"}]}, "LOWBIT_PORT: `server` sets every LOWBIT_"),
    ({"extraEnv": [{"name": "HOME", "value": "/data"}]}, "HOME, which the chart sets; leave it out"),
    ({"extraEnv": [{"name": "A", "value": "1"}, {"name": "A"}]}, "extraEnv names A twice"),
    ({"extraEnv": [{"name": "A", "value": "1", "valueFrom": {"a": 1}}]}, "both value and valueFrom"),
    ({"extraEnv": [{"name": "A", "value": "", "valueFrom": {"a": 1}}]}, "both value and valueFrom"),
    ({"extraEnvFrom": [{"prefix": "A"}]}, "one of configMapRef and secretRef"),
    ({"extraVolumes": [{"name": "cache"}]}, "cache, which is a volume of the chart.*volumes.cacheClaim"),
    ({"extraVolumes": [{"name": "a"}, {"name": "a"}]}, "extraVolumes names a twice"),
    ({"extraVolumeMounts": [{"name": "ca", "mountPath": "/ca"}]}, "ca is no volume of extraVolumes"),
    ({"extraVolumeMounts": [{"name": "tmp", "mountPath": "/cache/"}]}, "mounted at /cache already"),
    ({"sidecars": [{"name": "server", "image": "a:1"}]}, "the name server is taken"),
    ({"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]}, "Exists takes no value"),
    ({"tolerations": [{"effect": "NoSchedule"}]}, "without key needs operator Exists"),
    ({"tolerations": [{"key": "a", "tolerationSeconds": 1}]}, "tolerationSeconds needs effect NoExecute"),
    ({"dnsPolicy": "None"}, "needs dnsConfig.nameservers"),
    ({"resources": {"claims": [{"name": "gpu"}]}}, "claims names gpu, which is not in resourceClaims"),
    (
        {"resources": {"requests": {"memory": "9Gi"}}},
        "requests.memory is 9Gi, above resources.limits.memory, 8Gi",
    ),
    ({"resources": {"requests": {"hugepages-2Mi": "1Gi"}}}, "give the same in resources.limits"),
    ({"service": {"nodePort": 30080}}, "nodePort is 30080 and service.type ClusterIP has none"),
    ({"service": {"loadBalancerIP": "192.0.2.1"}}, "loadBalancerIP needs service.type LoadBalancer"),
    ({"service": {"ipFamilies": ["IPv4", "IPv6"]}}, "must be PreferDualStack or RequireDualStack"),
    (
        {"service": {"ipFamilies": ["IPv6"]}},
        'server.host 0.0.0.0 listens on IPv4 alone; set server.host to "::"',
    ),
    ({"service": {"extraPorts": [{"name": "http", "port": 1}]}}, "http .port 1/TCP. is there already"),
    (
        {
            "service": {
                "type": "NodePort",
                "nodePort": 30080,
                "extraPorts": [{"name": "a", "port": 1, "nodePort": 30080}],
            }
        },
        "a .port 1/TCP. is there already",
    ),
    ({"tls": {"ca": {"existingSecret": "ca"}}}, "tls.existingSecret is not: the server speaks HTTP"),
    (
        {"tls": {"existingSecret": "tls"}, "monitoring": {"serviceMonitor": {"enabled": True}}},
        "every scrape would fail; give tls.ca, or monitoring.serviceMonitor.tlsConfig",
    ),
    ({"loadtest": {"enabled": True}}, "needs loadtest.startAt: .* in UTC"),
    ({"loadtest": {"enabled": True, "startAt": "2026-11-28T13:00Z"}}, "needs loadtest.existingClaim"),
    ({"httpRoute": {"enabled": True}}, "httpRoute.enabled needs httpRoute.parentRefs"),
]


@pytest.mark.parametrize(("changes", "message"), BY_SCHEMA)
def test_schema_refuses_wrong_values_with_their_path(changes: Resource, message: str) -> None:
    with pytest.raises(helm_python.HelmValuesError, match=f"(?s){message}"):
        render(**changes)


@pytest.mark.parametrize(("changes", "message"), BY_TEMPLATE)
def test_template_refuses_values_that_do_not_go_together(changes: Resource, message: str) -> None:
    with pytest.raises(helm_python.HelmError, match=f"(?s){message}"):
        render(**changes)


def test_defaults_alone_are_refused_with_what_is_missing() -> None:
    with helm_python.Chart.load(CHART) as chart, pytest.raises(helm_python.HelmValuesError) as raised:
        chart.render()
    assert "at '/resources': missing properties 'requests', 'limits'" in str(raised.value)


def test_a_quantize_job_with_all_that_it_needs_is_accepted() -> None:
    assert "Job" in render(quantize=QUANTIZE | {"resources": RESOURCES}, checkpoint={"path": "a"})


def test_schema_refuses_unknown_keys_everywhere_but_in_what_is_handed_on() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    open_objects = []

    def visit(node: Any, path: str) -> None:
        if isinstance(node, dict):
            closed = node.get("additionalProperties", True) is not True
            if node.get("type") == "object" and not closed:
                open_objects.append(path)
            for key, child in node.items():
                visit(child, f"{path}/{key}")

    visit(schema, "")
    assert open_objects == ["/properties/global", "/$defs/kubernetes"]


def test_schema_describes_exactly_the_values() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def visit(values: Resource, node: Any, path: str) -> None:
        known = node.get("properties", {}).keys() - {"global"}
        if known:
            assert values.keys() == known, path
        for key in known & values.keys():
            if isinstance(values[key], dict):
                visit(values[key], node["properties"][key], f"{path}/{key}")

    visit(yaml.safe_load((CHART / "values.yaml").read_text()), schema, "")


def test_every_value_has_its_comment() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    assert len(lines) <= 320
    for above, line in zip(["", *lines], lines, strict=False):
        leaf = line.strip() and not line.strip().startswith("#") and not line.endswith(":")
        if leaf and not line.lstrip().startswith("- "):
            assert "  # " in line or above.strip().startswith("#"), line
