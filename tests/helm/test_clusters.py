"""Clusters as they are: mirrors, proxies, OpenShift, certificates of one's own, tainted nodes, IPv6, device claims."""

import argparse
from typing import Any

import pytest
from tests.helm.chart import Resource, container, pod, render, settings
from tests.helm.kubernetes_rules import faults, pods

from lowbit_loadtest.cli import command as loadtest

HUB: Resource = {"checkpoint": {"existingClaim": "", "hub": {"id": "a/b@c"}}}
LOADTEST: Resource = {
    "enabled": True,
    "startAt": "2026-11-28T13:00:00Z",
    "existingClaim": "results",
    "parts": 8,
}
CORPORATE: Resource = {
    "extraEnv": [
        {"name": "HF_ENDPOINT", "value": "https://hub.corp:8443/mirror"},
        {"name": "HTTPS_PROXY", "value": "http://user:secret@proxy.corp:3128"},
        {"name": "http_proxy", "value": "http://plain.corp"},
        {"name": "NO_PROXY", "value": ".corp"},
        {"name": "SSL_CERT_FILE", "value": "/etc/ca/ca.crt"},
    ],
    "extraEnvFrom": [{"configMapRef": {"name": "site"}}, {"secretRef": {"name": "site", "optional": True}}],
    "extraVolumes": [{"name": "ca", "configMap": {"name": "corp-ca"}}],
    "extraVolumeMounts": [{"name": "ca", "mountPath": "/etc/ca", "readOnly": True}],
}
PLACED: Resource = {
    "nodeSelector": {"kubernetes.io/arch": "arm64", "pool": "true"},
    "tolerations": [{"operator": "Exists"}],
    "hostAliases": [{"ip": "10.0.0.5", "hostnames": ["hub.corp"]}],
    "dnsConfig": {"nameservers": ["10.0.0.2"], "options": [{"name": "ndots", "value": "1"}]},
    "image": {"pullSecrets": ["registry"]},
}
EVERY_POD = [("one-gpu", {}), ("cpu", HUB), ("multi-node", {}), ("autoscaled", {"loadtest": LOADTEST})]


def containers(resources: dict[str, Resource]) -> dict[str, Resource]:
    """All containers of the chart, by pod and name."""
    return {
        f"{name}/{one['name']}": one
        for name, template in pods(resources).items()
        for one in [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]
    }


@pytest.mark.parametrize(("example", "changes"), EVERY_POD)
def test_mirrors_proxies_and_certificates_reach_every_container(example: str, changes: Resource) -> None:
    resources = render(example, **changes, **CORPORATE)
    assert faults(resources) == []
    for name, one in containers(resources).items():
        given = {entry["name"]: entry.get("value") for entry in one["env"]}
        for entry in CORPORATE["extraEnv"]:
            if entry["name"] != "NO_PROXY":
                assert given[entry["name"]] == entry["value"], name
        assert one["envFrom"][:2] == CORPORATE["extraEnvFrom"], name
        assert CORPORATE["extraVolumeMounts"][0] in one["volumeMounts"], name
    assert {"one-gpu": 4, "cpu": 3, "multi-node": 3, "autoscaled": 3}[example] == len(containers(resources))


def test_a_load_test_in_the_cluster_asks_no_proxy_for_the_service() -> None:
    for name, one in containers(render(**CORPORATE, loadtest=LOADTEST)).items():
        given = {entry["name"]: entry.get("value") for entry in one["env"]}
        client = name.startswith(("test", "LoadTest"))
        assert given["NO_PROXY"] == ("demo-lowbit.models.svc" if client else ".corp")
        assert ("no_proxy" in given) == client


def test_the_ports_of_mirrors_and_proxies_are_open_where_something_is_downloaded() -> None:
    def ports(policy: Resource) -> set[int]:
        return {port["port"] for rule in policy["spec"]["egress"] for port in rule.get("ports", [])}

    resources = render("cpu", **HUB, **CORPORATE)
    assert ports(resources["NetworkPolicy"]) == ports(resources["JobsPolicy"]) == {53, 80, 443, 3128, 8443}
    assert ports(render("cpu", **CORPORATE)["NetworkPolicy"]) == set()
    assert ports(render("multi-node", **HUB, **CORPORATE)["NodesPolicy"]) == {53, 80, 443, 3128, 8443}


def test_settings_of_the_server_win_over_an_environment_from_elsewhere() -> None:
    sources = container(render(**CORPORATE))["envFrom"]
    assert sources[-1] == {"configMapRef": {"name": "demo-lowbit"}}


def test_a_cluster_may_give_the_ids_of_users_and_groups() -> None:
    """OpenShift's restricted-v2 takes pods that name none, and gives each namespace a range."""
    left: Resource = {"podSecurityContext": dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"))}
    keys: Resource = {"apiKeys": {"existingSecret": "keys"}}
    for changes in (left, {"podSecurityContext": None}):
        resources = render(**changes, **keys, loadtest=LOADTEST)
        for template in pods(resources).values():
            assert template["spec"]["securityContext"] == {
                "runAsNonRoot": True,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            }
        (secret,) = [volume["secret"] for volume in pod(resources)["volumes"] if "secret" in volume]
        assert secret["defaultMode"] == 0o444  # nobody's group is known
    (secret,) = [volume["secret"] for volume in pod(render(**keys))["volumes"] if "secret" in volume]
    assert secret["defaultMode"] == 0o440


@pytest.mark.parametrize(("example", "changes"), EVERY_POD)
def test_tolerations_selectors_and_names_of_hosts_reach_every_pod(example: str, changes: Resource) -> None:
    resources = render(example, **changes, **PLACED)
    for name, template in pods(resources).items():
        spec = template["spec"]
        for key in ("nodeSelector", "tolerations", "hostAliases", "dnsConfig"):
            assert spec[key] == PLACED[key], (name, key)
        assert spec["imagePullSecrets"] == [{"name": "registry"}]


@pytest.mark.parametrize("kind", ["existingSecret", "existingConfigMap"])
def test_the_ca_of_the_pods_certificate_reaches_the_scrape_and_helm_test(kind: str) -> None:
    tls: Resource = {"existingSecret": "tls", "ca": {"existingSecret": "", kind: "ca", "key": "root.pem"}}
    resources = render("four-gpus", tls=tls, loadtest=LOADTEST)
    (endpoint,) = resources["ServiceMonitor"]["spec"]["endpoints"]
    source = {"existingSecret": "secret", "existingConfigMap": "configMap"}[kind]
    assert endpoint["tlsConfig"] == {
        "ca": {source: {"name": "ca", "key": "root.pem"}},
        "serverName": "demo-lowbit.models.svc",
    }
    for name in ("test", "LoadTest"):
        spec = pods(resources)[name]["spec"]
        (one,) = spec["containers"]
        assert "--ca-file=/etc/lowbit/ca/ca.crt" in one["args"]
        assert {"name": "tls-ca", "mountPath": "/etc/lowbit/ca", "readOnly": True} in one["volumeMounts"]
        (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "tls-ca"]
        assert volume[source]["items"] == [{"key": "root.pem", "path": "ca.crt"}]


def test_a_scrape_may_trust_otherwise_and_helm_test_may_not_check() -> None:
    monitor: Resource = {"serviceMonitor": {"enabled": True, "tlsConfig": {"insecureSkipVerify": True}}}
    resources = render(tls={"existingSecret": "tls"}, monitoring=monitor, test={"insecure": True})
    (endpoint,) = resources["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["tlsConfig"] == {"insecureSkipVerify": True, "serverName": "demo-lowbit.models.svc"}
    assert "--insecure" in resources["Pod"]["spec"]["containers"][0]["args"]
    assert "--insecure" not in render(test={"insecure": True})["Pod"]["spec"]["containers"][0]["args"]


def test_a_certificate_may_have_other_names_in_its_secret() -> None:
    tls: Resource = {"existingSecret": "tls", "certKey": "server.pem", "privateKeyKey": "server.key"}
    given = settings(render(tls=tls))
    assert given["LOWBIT_SSL_CERTFILE"] == "/etc/lowbit/tls/server.pem"
    assert given["LOWBIT_SSL_KEYFILE"] == "/etc/lowbit/tls/server.key"


def test_a_service_is_what_its_cluster_wants() -> None:
    internal = {"service.beta.kubernetes.io/aws-load-balancer-internal": "true"}
    service: Resource = {
        "type": "LoadBalancer",
        "port": 443,
        "nodePort": 30080,
        "annotations": internal,
        "loadBalancerClass": "example.org/lb",
        "loadBalancerIP": "192.0.2.7",
        "loadBalancerSourceRanges": ["192.0.2.0/24"],
        "externalTrafficPolicy": "Local",
        "ipFamilyPolicy": "RequireDualStack",
        "ipFamilies": ["IPv6", "IPv4"],
        "extraPorts": [{"name": "proxy-metrics", "port": 9090, "targetPort": "metrics"}],
    }
    resources = render(service=service, server={"host": "::"}, tls={"existingSecret": "tls"})
    spec = resources["Service"]["spec"]
    assert resources["Service"]["metadata"]["annotations"] == internal
    port, extra = spec.pop("ports")
    # Istio, gateways and clouds read there what the port speaks.
    assert port == {
        "name": "http",
        "appProtocol": "https",
        "port": 443,
        "targetPort": "http",
        "nodePort": 30080,
    }
    assert extra == service["extraPorts"][0]
    assert {key: value for key, value in spec.items() if key != "selector"} == {
        key: value
        for key, value in service.items()
        if key not in ("port", "nodePort", "annotations", "extraPorts")
    }
    assert settings(resources)["LOWBIT_HOST"] == "::"


def test_devices_by_claim_take_the_place_of_the_device_plugin() -> None:
    claim = {"name": "gpus", "resourceClaimTemplateName": "two-gpus"}
    other = {"name": "nic", "resourceClaimName": "rdma"}
    resources = render(
        "one-gpu",
        gpu={"count": 2},
        resourceClaims=[claim, other],
        resources={"claims": [{"name": "gpus"}], "limits": {"hugepages-2Mi": "1Gi"}},
    )
    assert faults(resources) == []
    assert pod(resources)["resourceClaims"] == [claim]
    given = container(resources)["resources"]
    assert given["claims"] == [{"name": "gpus"}]
    assert given["limits"] == {"memory": "24Gi", "hugepages-2Mi": "1Gi"}
    assert settings(resources)["LOWBIT_TENSOR_PARALLEL_SIZE"] == "2"
    assert "resourceClaims" not in resources["Job"]["spec"]["template"]["spec"]


def test_compile_caches_may_be_kept_on_a_claim() -> None:
    resources = render("one-gpu", volumes={"cacheClaim": "caches"})
    (cache,) = [volume for volume in pod(resources)["volumes"] if volume["name"] == "cache"]
    assert cache["persistentVolumeClaim"] == {"claimName": "caches"}
    jobs = resources["Job"]["spec"]["template"]["spec"]["volumes"]
    assert {"name": "cache", "emptyDir": {"sizeLimit": "50Gi"}} in jobs


def test_containers_of_the_user_run_before_the_charts_own() -> None:
    first = {"name": "first", "image": "first:1"}
    names = [one["name"] for one in pod(render("one-gpu", initContainers=[first]))["initContainers"]]
    assert names == ["first", "wait-for-checkpoint"]


def test_the_nodes_network_keeps_the_clusters_names_and_lets_helm_test_through() -> None:
    resources = render(hostNetwork=True)
    spec = pod(resources)
    assert (spec["hostNetwork"], spec["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    assert "hostNetwork" not in resources["Pod"]["spec"]
    assert {"ports": [{"port": 8000, "protocol": "TCP"}]} in resources["JobsPolicy"]["spec"]["egress"]
    assert "dnsPolicy" not in pod(render())


@pytest.mark.parametrize(
    ("gpu", "device"),
    [
        ({"count": 0}, "cpu"),
        ({"resourceName": "nvidia.com/mig-1g.10gb"}, "gpu"),
        ({"resourceName": "amd.com/gpu"}, "rocm"),
    ],
)
def test_the_image_fits_the_device(gpu: Resource, device: str) -> None:
    resources = render("one-gpu", gpu=gpu, image={"digest": ""})
    assert {one["image"] for one in containers(resources).values()} == {f"lowbit:0.1.0-{device}"}


def parsed(one: Resource, **filled: str) -> argparse.Namespace:
    """The flags of a load test's container, as its shell and the kubelet make them."""
    words = [word.replace("$(JOB_COMPLETION_INDEX)", filled.get("index", "")) for word in one["args"]]
    parser = argparse.ArgumentParser()
    loadtest.add_arguments(parser)
    return parser.parse_args([f"--part={int(filled['index']) + 1}/{filled['parts']}", *words])


def test_a_load_test_from_many_machines_plays_one_plan_in_parts() -> None:
    resources = render("one-gpu", loadtest=LOADTEST | {"seed": 7, "scenarioConfigMap": "night"})
    job = resources["LoadTest"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 8, 8)
    spec = job["template"]["spec"]
    (one,) = spec["containers"]
    environment = {entry["name"]: entry.get("value") for entry in one["env"]}
    # The shell adds one to the index, and hands on every argument as it is.
    script = 'exec lowbit loadtest --part "$((JOB_COMPLETION_INDEX + 1))/$PARTS" "$@"'
    assert one["command"] == ["sh", "-c", script, "loadtest"]
    asked = parsed(one, index="7", parts=environment["PARTS"])
    assert (str(asked.json), asked.seed) == ("/results/part-7.json", 7)
    assert str(asked.scenario) == "/scenario/scenario.yaml"
    assert "LOWBIT_API_KEY" in environment
    places = {mount["mountPath"] for mount in one["volumeMounts"]}
    assert {"/results", "/scenario"} <= places
    # Its pods are told apart from the server's, and are let out by the policy of the pods that end.
    assert job["template"]["metadata"]["labels"]["app.kubernetes.io/component"] == "loadtest"
    (components,) = resources["JobsPolicy"]["spec"]["podSelector"]["matchExpressions"]
    assert "loadtest" in components["values"]


def test_another_moment_is_another_load_test() -> None:
    def name(**changes: Any) -> str:
        return str(render(loadtest=LOADTEST | changes)["LoadTest"]["metadata"]["name"])

    assert name() == name()
    assert name() != name(startAt="2026-11-28T14:00:00Z")
    assert "LoadTest" not in render()
