"""Names: every one a DNS label, no two releases' the same, and text where YAML reads numbers, whatever the release."""

import shutil
from itertools import pairwise
from pathlib import Path

import helm_python
import pytest
import yaml
from tests.helm.chart import CHART, EXAMPLES, Resource, merged, release, render
from tests.helm.kubernetes_rules import faults

CPU = EXAMPLES["cpu"]
GROUP = EXAMPLES["multi-node"]
# In pairs that a chart which only cuts, or only replaces dots, or only leaves out its own name, gives one name.
RELEASES = [
    "team-platform-inference-production-llama-3-70b-a-blue",
    "team-platform-inference-production-llama-3-70b-a-gren",
    *("llama-3.1", "llama-3-1", "llama.3.1"),
    *("70b-chat", "lowbit-70b-chat", "70b.chat"),
    *("demo", "demo-lowbit", "lowbit-demo", "lowbit", "lowbit-lowbit"),
    *("123", "1.2", "true", "null", "1e3", "0x1f", "y"),
    *("a" * 53, "a" * 52 + "b", "a." * 26 + "a", "a" * 50 + ".bc"),
]


def fullname(name: str, values: Resource = CPU) -> str:
    return str(release(values, name)["Service"]["metadata"]["name"])


def test_no_two_releases_share_a_name() -> None:
    names = {name: fullname(name) for name in RELEASES}
    assert len(set(names.values())) == len(RELEASES), names
    assert (names["demo"], names["lowbit"], names["lowbit-demo"]) == ("demo-lowbit", "lowbit", "lowbit-demo")


@pytest.mark.parametrize("values", [CPU, GROUP, EXAMPLES["one-gpu"]], ids=["cpu", "group", "job"])
@pytest.mark.parametrize("name", RELEASES)
def test_every_release_has_names_that_kubernetes_takes(name: str, values: Resource) -> None:
    assert faults(release(values, name)) == []


@pytest.mark.parametrize(
    "override", ["llama-3.1", "70b", "1e3", "no", "a" * 44 + ".bcd", "a-."[:1] + "b" * 62]
)
def test_an_override_becomes_a_label_of_its_own(override: str) -> None:
    for key in ("nameOverride", "fullnameOverride"):
        assert faults(release(merged(CPU, {key: override}))) == []
    assert fullname("a", merged(CPU, {"fullnameOverride": override})) == fullname(
        "b", merged(CPU, {"fullnameOverride": override})
    )


def test_numbers_as_namespace_and_secrets_stay_text() -> None:
    changes = {
        "namespaceOverride": "123",
        "tls": {"existingSecret": "1", "ca": {"existingSecret": "2", "key": "3"}},
        "apiKeys": {"existingSecret": "4", "key": "5"},
        "image": {"pullSecrets": ["6", {"name": "7"}]},
        "priorityClassName": "8",
        "serviceAccount": {"name": "9"},
        "volumes": {"cacheClaim": "10"},
        "checkpoint": {"existingClaim": "11"},
        "test": {"apiKey": {"existingSecret": "12", "key": "13"}},
    }
    resources = release(merged(CPU, changes))
    assert faults(resources) == []
    spec = resources["Deployment"]["spec"]["template"]["spec"]
    assert spec["imagePullSecrets"] == [{"name": "6"}, {"name": "7"}]
    assert (spec["priorityClassName"], spec["serviceAccountName"]) == ("8", "9")
    names = [v.get("secret", {}).get("secretName") for v in spec["volumes"]]
    assert {"1", "4"} <= set(names)
    claims = [v.get("persistentVolumeClaim", {}).get("claimName") for v in spec["volumes"]]
    assert {"10", "11"} <= set(claims)


def test_another_namespace_is_every_resources_and_every_addresss() -> None:
    resources = render("autoscaled", namespaceOverride="elsewhere", loadtest=_LOADTEST)
    assert {resource["metadata"]["namespace"] for resource in resources.values()} == {"elsewhere"}
    assert "models" not in str(resources["PrometheusRule"]["spec"]) + str(resources["ScaledObject"]["spec"])
    for pod in (resources["Pod"]["spec"], resources["LoadTest"]["spec"]["template"]["spec"]):
        assert "--target=http://demo-lowbit.elsewhere.svc:8000" in pod["containers"][0]["args"]


_LOADTEST: Resource = {"enabled": True, "startAt": "2026-11-28T13:00:00Z", "existingClaim": "results"}


def parent(folder: Path, alias: str = "") -> Path:
    """An umbrella chart with this one as a dependency."""
    shutil.copytree(CHART, folder / "charts" / "lowbit")
    name = f", alias: {alias}" if alias else ""
    (folder / "Chart.yaml").write_text(
        "apiVersion: v2\nname: shop\nversion: 1.0.0\ndependencies:\n"
        f'  - {{name: lowbit, version: 0.1.0, repository: "", condition: lowbit.enabled{name}}}\n'
    )
    return folder


def test_a_parent_chart_switches_it_off_and_gives_registry_and_pull_secrets(tmp_path: Path) -> None:
    shared = {"imageRegistry": "mirror.example.org:5000", "imagePullSecrets": ["a", {"name": "b"}]}
    folder = parent(tmp_path)

    def rendered(values: Resource) -> dict[str, str]:
        with helm_python.Chart.load(folder) as chart:  # loaded anew: what a condition left out stays out
            return dict(chart.render(values, name="shop", namespace="models"))

    off = rendered({"lowbit": {"enabled": False}})
    on = rendered({"global": shared, "lowbit": CPU | {"enabled": True}})
    assert [path for path, text in off.items() if "/lowbit/" in path and text.strip()] == []
    (deployment,) = [text for path, text in on.items() if path.endswith("/deployment.yaml")]
    assert 'image: "mirror.example.org:5000/lowbit:0.1.0-cpu"' in deployment
    assert 'imagePullSecrets:\n        - name: "a"\n        - name: "b"' in deployment


@pytest.mark.parametrize("alias", ["Chat_Model", "70b", "x" * 60])
def test_an_alias_of_a_parent_chart_is_no_name_that_kubernetes_refuses(alias: str, tmp_path: Path) -> None:
    with helm_python.Chart.load(parent(tmp_path, alias)) as chart:
        files = chart.render({alias: CPU}, name="shop", namespace="models")
    resources = [
        yaml.safe_load(text) for path, text in files.items() if path.endswith(".yaml") and text.strip()
    ]
    assert faults({one["kind"]: one for one in resources}) == []


def test_a_registry_of_a_parent_takes_the_place_of_ours_and_no_part_of_the_name() -> None:
    for given, image in (
        ("lowbit", "m.example/lowbit"),
        ("acme/lowbit", "m.example/acme/lowbit"),
        ("registry.corp:5000/ai/lowbit", "m.example/ai/lowbit"),
        ("localhost/lowbit", "m.example/lowbit"),
    ):
        values = merged(CPU, {"global": {"imageRegistry": "m.example"}, "image": {"repository": given}})
        (server,) = release(values)["Deployment"]["spec"]["template"]["spec"]["containers"]
        assert server["image"] == f"{image}:0.1.0-cpu"


def test_the_same_values_render_to_the_same_bytes() -> None:
    """Argo CD and Flux compare renderings: nothing may depend on the time, on chance or on the cluster."""
    renderings = [str(render("autoscaled", loadtest=_LOADTEST)) for _ in range(3)]
    assert all(one == other for one, other in pairwise(renderings))
    text = "".join(path.read_text() for path in (CHART / "templates").rglob("*.*"))
    assert not [word for word in ("now |", "(now)", "rand", "lookup ", "genCA", "uuidv4") if word in text]
