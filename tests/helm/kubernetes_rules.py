"""What the API server asks of manifests beyond their schemas: names, labels, and lists that must fit each other.

Rules: https://kubernetes.io/docs/concepts/overview/working-with-objects/names, …/labels, and the validation of pods in
pkg/apis/core/validation. `faults` knows nothing of this chart but how its `render` names the resources.
"""

import re
from collections.abc import Iterator
from typing import Any

from tests.helm.chart import Resource

LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
DNS_1035_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
DNS_1123_LABEL = re.compile(LABEL)
DNS_1123_SUBDOMAIN = re.compile(rf"(?=.{{1,253}}\Z){LABEL}(\.{LABEL})*")
QUALIFIED_NAME = re.compile(rf"({LABEL}(\.{LABEL})*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
PORT_NAME = re.compile(r"(?=.{1,15}\Z)(?=.*[a-z])(?!.*--)[a-z0-9]([-a-z0-9]*[a-z0-9])?")
ENV_NAME = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
# A Service and a StatefulSet's pods must be DNS-1035; a Job's name is a label of its pods.
NAMES = {"Service": DNS_1035_LABEL, "LeaderWorkerSet": DNS_1035_LABEL, "Job": DNS_1123_LABEL}
SCALES = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
SCALES |= {f"{letter}i": 1024.0 ** (power + 1) for power, letter in enumerate("KMGTPE")}
SHARED = {"cpu", "memory", "ephemeral-storage"}


def faults(resources: dict[str, Resource]) -> list[str]:
    """What the API server would refuse, or what would not find its other half."""
    found = [fault for resource in resources.values() for fault in of_resource(resource)]
    for name, template in pods(resources).items():
        found += [f"{name}: {fault}" for fault in of_pod(template)]
    return [*found, *of_selectors(resources), *of_long_names(resources)]


def pods(resources: dict[str, Resource]) -> dict[str, Resource]:
    """Every pod, by what it does."""
    found: dict[str, Resource] = {"test": resources["Pod"]}
    for kind in ("Deployment", "Job", "LoadTest"):
        if kind in resources:
            found[kind] = resources[kind]["spec"]["template"]
    if "LeaderWorkerSet" in resources:
        group = resources["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
        found |= {"leader": group["leaderTemplate"], "follower": group["workerTemplate"]}
    return found


def of_resource(resource: Resource) -> Iterator[str]:
    kind, metadata = resource["kind"], resource["metadata"]
    if not NAMES.get(kind, DNS_1123_SUBDOMAIN).fullmatch(metadata["name"]):
        yield f"{kind}: name {metadata['name']!r}"
    if not DNS_1123_LABEL.fullmatch(metadata["namespace"]):
        yield f"{kind}: namespace {metadata['namespace']!r}"
    for key, value in _found(resource, ("labels", "matchLabels", "nodeSelector")):
        if not (QUALIFIED_NAME.fullmatch(key) and isinstance(value, str) and LABEL_VALUE.fullmatch(value)):
            yield f"{kind}: label {key!r}: {value!r}"
    for key, value in _found(resource, ("annotations",)):
        if not (QUALIFIED_NAME.fullmatch(key) and isinstance(value, str)):
            yield f"{kind}: annotation {key!r}: {value!r}"
    if kind == "Service":
        names = [port["name"] for port in resource["spec"]["ports"]]
        yield from _repeated("port of the Service", names)
        for number in ("port", "nodePort"):
            given = [
                f"{p[number]}/{p.get('protocol', 'TCP')}" for p in resource["spec"]["ports"] if number in p
            ]
            yield from _repeated(number, given)
        yield from (f"Service: port {name!r}" for name in names if not DNS_1123_LABEL.fullmatch(name))


def of_pod(template: Resource) -> Iterator[str]:
    spec = template["spec"]
    volumes = [volume["name"] for volume in spec["volumes"]]
    containers = [*spec.get("initContainers", []), *spec["containers"]]
    names = [container["name"] for container in containers]
    claims = [claim["name"] for claim in spec.get("resourceClaims", [])]
    for what, given in (("volume", volumes), ("container", names), ("claim", claims)):
        yield from _repeated(what, given)
        yield from (f"{what} {name!r}" for name in given if not DNS_1123_LABEL.fullmatch(name))
    for container in containers:
        for fault in of_container(container, set(volumes), set(claims)):
            yield f"{container['name']}: {fault}"


def of_container(container: Resource, volumes: set[str], claims: set[str]) -> Iterator[str]:
    mounts = container.get("volumeMounts", [])
    yield from (f"mount of no volume {m['name']!r}" for m in mounts if m["name"] not in volumes)
    yield from _repeated("mount at", [mount["mountPath"].rstrip("/") for mount in mounts])
    environment = container.get("env", [])
    yield from _repeated("variable", [entry["name"] for entry in environment])
    for entry in environment:
        if not ENV_NAME.fullmatch(entry["name"]) or ("value" in entry and "valueFrom" in entry):
            yield f"variable {entry}"
    ports = [port["name"] for port in container.get("ports", []) if "name" in port]
    yield from _repeated("port", ports)
    yield from (f"port {name!r}" for name in ports if not PORT_NAME.fullmatch(name))
    resources = container.get("resources", {})
    used = [claim["name"] for claim in resources.get("claims", [])]
    yield from (f"claim of no resourceClaim {name!r}" for name in used if name not in claims)
    limits = resources.get("limits", {})
    for name, request in resources.get("requests", {}).items():
        limit = limits.get(name, request if name in SHARED else None)
        if limit is None or amount(request) > amount(limit) * (1 + 1e-12):
            yield f"{name}: request {request} over limit {limit}"


def of_selectors(resources: dict[str, Resource]) -> Iterator[str]:
    """Servers are found by what looks for servers, and by nothing do the other pods become servers."""
    labels = {name: pod["metadata"]["labels"] for name, pod in pods(resources).items()}
    serving = {name for name in labels if name in ("Deployment", "leader")}
    for kind, selector in (
        ("Service", resources["Service"]["spec"]["selector"]),
        (
            "Deployment",
            resources.get("Deployment", {}).get("spec", {}).get("selector", {}).get("matchLabels"),
        ),
    ):
        if selector is not None:
            found = {name for name, given in labels.items() if selector.items() <= given.items()}
            if found != serving:
                yield f"{kind} selects {sorted(found)}, not {sorted(serving)}"
    monitor = resources.get("ServiceMonitor", {"spec": {"selector": {"matchLabels": {}}}})["spec"]["selector"]
    if not monitor["matchLabels"].items() <= resources["Service"]["metadata"]["labels"].items():
        yield "ServiceMonitor does not select the Service"


def of_long_names(resources: dict[str, Resource]) -> Iterator[str]:
    """Names that controllers make of ours and put into labels of 63 characters."""
    made = []
    if "LoadTest" in resources:
        job = resources["LoadTest"]
        made.append(f"{job['metadata']['name']}-{job['spec']['completions'] - 1}")
    if "LeaderWorkerSet" in resources:  # the workers' StatefulSet of the 1000th group, and its revision
        made.append(f"{resources['LeaderWorkerSet']['metadata']['name']}-999-0123456789")
    yield from (f"{name} has {len(name)} characters" for name in made if len(name) > 63)


def amount(quantity: str | float) -> float:
    """A quantity as a number."""
    if not isinstance(quantity, str):
        return float(quantity)
    number, suffix = re.fullmatch(r"([0-9.e+-]+?)([A-Za-z]*)", quantity).groups()  # type: ignore[union-attr]
    return float(number) * SCALES.get(suffix, 1.0)


def _found(node: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key in keys and isinstance(value, dict):
                yield from value.items()
            yield from _found(value, keys)
    elif isinstance(node, list):
        for item in node:
            yield from _found(item, keys)


def _repeated(what: str, names: list[str]) -> Iterator[str]:
    yield from (f"{what} {name!r} twice" for name in sorted({n for n in names if names.count(n) > 1}))
