"""What the rendered chart says: settings, hardening, probes, selectors, scaling."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tests.helm.chart import (
    EXAMPLES,
    ROOT,
    Resource,
    container,
    parse,
    parsed,
    pod,
    render,
    settings,
)
from tests.helm.kubernetes_rules import pods
from tests.helm.test_clusters import LOADTEST

from lowbit_loadtest.cli import command as loadtest
from lowbit_server.config import ServeConfig
from lowbit_server.flags import GIB, flags_of

EVERY_FLAG: Resource = {
    "servedModelName": "a name",
    "maxModelLen": 1048576,
    "kvCacheGib": 1.5,
    "kvCacheDtype": "fp8",
    "gpuMemoryUtilization": 0.9,
    "maxNumSeqs": 64,
    "maxNumQueuedReqs": 100000,
    "maxNumQueuedTokens": 2097152,
    "requestTimeoutS": 3600,
    "maxBodyBytes": 1073741824,
    "maxOutputTokens": 4096,
    "corsOrigins": ["https://a.example", "https://b.example"],
    "drainTimeoutS": 45,
    "noRequestLog": True,
    "noPage": True,
    "enforceEager": True,
    "allowRejected": True,
    "skipHashCheck": True,
    "toolCallParser": "hermes",
    "usageFile": "/data/usage.db",
    "pricePerHour": 2.4,
    "shadow": "http://base:8000/v1",
    "shadowShare": 0.001,
    "shadowKeyFile": "/etc/base/key",
    "shadowMaxTokens": 2048,
    "rootPath": "/llm",
    "forwardedAllowIps": ["10.0.0.0/8", "192.0.2.1"],
    "strictTools": "parameter",
    "jsonWhitespace": "none",
    "reasoningParser": "qwen3",
    "loraModules": ["poet=/checkpoint/poet"],
    "loraDir": "/checkpoint/adapters",
    "maxLoras": 8,
    "maxLoraRank": 64,
    "maxHeaderBytes": 8192,
    "maxPromptCharacters": 100000,
    "otlpTracesEndpoint": "http://collector:4318/v1/traces",
    "trustRemoteCode": True,
}
# Set by no value: the same as LOWBIT_KV_CACHE_GIB; a port without keys, which a pod's network would open to all; and a
# Unix socket, which nobody outside the pod reaches.
UNSET = {"LOWBIT_KV_CACHE_MEMORY_BYTES", "LOWBIT_ADMIN_PORT", "LOWBIT_UDS"}


def test_chart_sets_exactly_the_variables_that_the_server_reads() -> None:
    read = {"LOWBIT_DIR", *(flag.variable for flag in flags_of(ServeConfig))}
    secrets = {"apiKeys": {"existingSecret": "keys"}, "tls": {"existingSecret": "tls"}}
    monitoring = {"serviceMonitor": {"enabled": False}}
    everything = render("multi-node", server=EVERY_FLAG, **secrets, monitoring=monitoring)
    assert set(settings(everything)) == read - UNSET


def test_every_value_of_server_reaches_the_server_as_meant() -> None:
    assert parsed(settings(render("four-gpus", server=EVERY_FLAG))) == ServeConfig(
        directory=Path("/checkpoint"),
        host="0.0.0.0",
        port=8000,
        served_model_name=("a name",),
        max_model_len=1048576,
        kv_cache_memory_bytes=3 * GIB // 2,
        kv_cache_dtype="fp8",
        gpu_memory_utilization=0.9,
        tensor_parallel_size=4,
        max_num_seqs=64,
        max_num_queued_reqs=100000,
        max_num_queued_tokens=2097152,
        api_keys=Path("/etc/lowbit/keys/keys.yaml"),
        request_timeout_s=3600,
        max_body_bytes=1 << 30,
        max_output_tokens=4096,
        cors_origins=("https://a.example", "https://b.example"),
        ssl_certfile=Path("/etc/lowbit/tls/tls.crt"),
        ssl_keyfile=Path("/etc/lowbit/tls/tls.key"),
        no_request_log=True,
        no_page=True,
        enforce_eager=True,
        allow_rejected=True,
        skip_hash_check=True,
        drain_timeout_s=45,
        tool_call_parser="hermes",
        usage_file=Path("/data/usage.db"),
        price_per_hour=2.4,
        shadow="http://base:8000",
        shadow_share=0.001,
        shadow_key_file=Path("/etc/base/key"),
        shadow_max_tokens=2048,
        root_path="/llm",
        forwarded_allow_ips=("10.0.0.0/8", "192.0.2.1/32"),
        strict_tools="parameter",
        json_whitespace="none",
        reasoning_parser="qwen3",
        lora_modules=(("poet", Path("/checkpoint/poet")),),
        lora_dir=Path("/checkpoint/adapters"),
        max_loras=8,
        max_lora_rank=64,
        max_header_bytes=8192,
        max_prompt_characters=100000,
        otlp_traces_endpoint="http://collector:4318/v1/traces",
        trust_remote_code=True,
    )


def test_values_left_null_are_left_to_the_server() -> None:
    assert parsed(settings(render(server={"kvCacheGib": None}))) == ServeConfig(
        directory=Path("/checkpoint"), host="0.0.0.0", drain_timeout_s=60
    )


def test_other_environment_holds_no_setting_of_the_server() -> None:
    server = container(render(extraEnv=[{"name": "OMP_NUM_THREADS", "value": "4"}]))
    assert [entry["name"] for entry in server["env"]] == [
        *("HOME", "USER", "HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS", "OMP_NUM_THREADS")
    ]
    assert server["args"] == ["serve"]
    # A service named lowbit would set LOWBIT_PORT=tcp://… in every pod, and `lowbit serve` reads LOWBIT_PORT.
    assert pod(render())["enableServiceLinks"] is False


def test_changed_settings_replace_the_pods() -> None:
    def checksum(**server: Any) -> str:
        annotations = render(server=server)["Deployment"]["spec"]["template"]["metadata"]["annotations"]
        return str(annotations["checksum/settings"])

    assert checksum(maxNumSeqs=1) != checksum(maxNumSeqs=2)


def test_gpus_are_limited_and_split_the_model() -> None:
    resources = render("four-gpus")
    assert container(resources)["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert settings(resources)["LOWBIT_TENSOR_PARALLEL_SIZE"] == "4"
    assert "nvidia.com/gpu" not in container(render("cpu"))["resources"]["limits"]


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_pod_meets_the_restricted_security_standard(example: str) -> None:
    resources = render(example, loadtest=LOADTEST)
    assert resources["ServiceAccount"]["automountServiceAccountToken"] is False
    for template in pods(resources).values():
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for one in [*spec["containers"], *spec.get("initContainers", [])]:
            assert one["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= one["resources"]["requests"].keys()
            assert "memory" in one["resources"]["limits"]


@pytest.mark.parametrize("example", EXAMPLES)
def test_only_emptydirs_are_writable_and_every_mount_has_its_volume(example: str) -> None:
    resources = render(example)
    volumes = {volume.pop("name"): volume for volume in pod(resources)["volumes"]}
    mounts = {mount["name"]: mount for mount in container(resources)["volumeMounts"]}
    assert mounts.keys() == volumes.keys()
    writable = {name for name, mount in mounts.items() if not mount.get("readOnly")}
    assert writable == {name for name, volume in volumes.items() if "emptyDir" in volume}


def test_checkpoint_comes_from_a_claim_or_an_image() -> None:
    claimed = {volume["name"]: volume for volume in pod(render("one-gpu"))["volumes"]}
    assert claimed["checkpoint"]["persistentVolumeClaim"] == {"claimName": "checkpoints", "readOnly": True}
    assert settings(render("one-gpu"))["LOWBIT_DIR"] == "/checkpoint/qwen3-8b-awq"
    pulled = {volume["name"]: volume for volume in pod(render("four-gpus"))["volumes"]}
    assert pulled["checkpoint"]["image"]["reference"].startswith("registry.example.org/checkpoints/")


def test_checkpoint_of_the_hub_is_downloaded_at_its_revision_before_the_server_starts(tmp_path: Path) -> None:
    hub = {"id": "acme/llama-w4a16@v1.2", "existingSecret": "hub", "key": "token"}
    resources = render("cpu", checkpoint={"existingClaim": "", "hub": hub})
    spec = pod(resources)
    (download,) = spec["initContainers"]
    # Run offline, the command says what it would have fetched.
    hf, *arguments = download["command"]
    command = [str(Path(sys.executable).with_name(hf)), *arguments]
    offline = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, env=offline, capture_output=True, text=True, check=False)
    assert "/acme/llama-w4a16/revision/v1.2: offline mode" in done.stderr
    assert arguments[-2:] == ["--local-dir", "/checkpoint"]
    environment = {entry["name"]: entry["value"] for entry in download["env"]}
    assert (environment["HF_HUB_OFFLINE"], environment["HF_TOKEN_PATH"]) == ("0", "/etc/lowbit/hub/token")
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes["checkpoint"]["emptyDir"]["sizeLimit"] == "2Gi"
    assert volumes["hub-token"]["secret"]["secretName"] == "hub"
    writable = {mount["name"] for mount in download["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"checkpoint", "tmp", "cache"}
    assert "hub-token" not in {mount["name"] for mount in container(resources)["volumeMounts"]}
    (egress,) = resources["NetworkPolicy"]["spec"]["egress"]
    assert {port["port"] for port in egress["ports"]} == {53, 443}


def test_probes_ask_the_right_path_and_startup_has_the_whole_budget() -> None:
    server = container(render(startup={"budgetS": 901}))
    paths = {kind: server[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/startupz", "readiness": "/readyz", "liveness": "/livez"}
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 905
    assert container(render("four-gpus"))["livenessProbe"]["httpGet"]["scheme"] == "HTTPS"


def test_startup_budget_follows_from_the_size_of_the_checkpoint() -> None:
    startup = container(render(checkpoint={"sizeGib": 40}))["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 300 + 30 * 40


def test_grace_period_just_long_enough_is_accepted_and_covers_the_engines_end() -> None:
    spec = pod(render(shutdown={"terminationGracePeriodS": 91}))
    assert spec["terminationGracePeriodSeconds"] == 91
    engine = (
        ROOT / "server" / "lowbit_server" / "engine" / "vllm_engine.py"
    ).read_text()  # importing it would import vLLM
    (stop_s,) = re.findall(r"^PROCESS_STOP_S = (\d+)", engine, re.MULTILINE)
    assert int(stop_s) < 20


def test_service_monitor_policy_and_budget_select_the_servers_pods_only() -> None:
    resources = render("autoscaled", quantize=EXAMPLES["one-gpu"]["quantize"])
    labels = resources["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    selectors = [
        resources["Deployment"]["spec"]["selector"]["matchLabels"],
        resources["Service"]["spec"]["selector"],
        resources["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        resources["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ]
    others = [
        resources["Job"]["spec"]["template"]["metadata"]["labels"],
        resources["Pod"]["metadata"]["labels"],
    ]
    for selector in selectors:
        assert selector.items() <= labels
        assert not any(selector.items() <= other.items() for other in others)
    monitor = resources["ServiceMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= resources["Service"]["metadata"]["labels"].items()


def test_scraping_a_server_with_keys_and_tls_uses_an_admin_key_and_https() -> None:
    (endpoint,) = render("four-gpus")["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": "lowbit-scrape-key", "key": "api-key"}
    assert endpoint["scheme"] == "https"


def test_key_entries_become_a_file_that_the_server_reads(tmp_path: Path) -> None:
    from lowbit_server.gateway.keys import read_keys

    resources = render("one-gpu")
    (tmp_path / "keys.yaml").write_text(resources["Secret"]["stringData"]["keys.yaml"])
    assert {key.name: key.admin for key in read_keys(tmp_path / "keys.yaml").values()} == {
        "team-a": False,
        "operations": True,
    }
    entry = {"name": "a", "sha256": "a" * 64, "tokens_per_month": 50_000_000}
    (tmp_path / "quota.yaml").write_text(
        render(apiKeys={"entries": [entry]})["Secret"]["stringData"]["keys.yaml"]
    )
    assert [key.tokens_per_month for key in read_keys(tmp_path / "quota.yaml").values()] == [50_000_000]
    assert settings(resources)["LOWBIT_API_KEYS"] == "/etc/lowbit/keys/keys.yaml"
    assert container(resources)["volumeMounts"][-1]["mountPath"] == "/etc/lowbit/keys"


def test_helm_test_is_a_load_test_of_the_service() -> None:
    resources = render("cpu")
    name, *arguments = resources["Pod"]["spec"]["containers"][0]["args"]
    assert name == "loadtest"
    assert parse(loadtest, arguments).target == "http://demo-lowbit.models.svc:8000"
    assert resources["Pod"]["metadata"]["annotations"]["helm.sh/hook"] == "test"


def test_an_autoscaler_owns_the_number_of_replicas() -> None:
    assert "replicas" not in render("autoscaled")["Deployment"]["spec"]
    assert render("cpu", replicas=0)["Deployment"]["spec"]["replicas"] == 0


def test_ingress_and_route_open_the_api_and_nothing_else() -> None:
    (rule,) = render("one-gpu")["Ingress"]["spec"]["rules"]
    assert [path["path"] for path in rule["http"]["paths"]] == ["/v1"]
    (route,) = render("autoscaled")["HTTPRoute"]["spec"]["rules"]
    assert [match["path"]["value"] for match in route["matches"]] == ["/v1"]


def test_the_server_reaches_nothing_and_only_named_peers_reach_it() -> None:
    policy = render("autoscaled")["NetworkPolicy"]["spec"]
    assert policy["egress"] == []
    (ingress,) = policy["ingress"]
    assert ingress["ports"] == [{"port": "http", "protocol": "TCP"}]
    assert render(networkPolicy={"from": []})["NetworkPolicy"]["spec"]["ingress"] == []


def test_sidecars_volumes_and_placement_are_handed_on() -> None:
    resources = render(
        sidecars=[{"name": "proxy", "image": "proxy:1"}],
        extraVolumes=[{"name": "ca", "configMap": {"name": "ca"}}],
        extraVolumeMounts=[{"name": "ca", "mountPath": "/etc/ca", "readOnly": True}],
        affinity={"nodeAffinity": {}},
        podLabels={"team": "a"},
        podAnnotations={"note": "b"},
    )
    assert [one["name"] for one in pod(resources)["containers"]] == ["server", "proxy"]
    assert pod(resources)["volumes"][-1]["name"] == "ca"
    assert container(resources)["volumeMounts"][-1]["mountPath"] == "/etc/ca"
    assert pod(resources)["affinity"] == {"nodeAffinity": {}}
    metadata = resources["Deployment"]["spec"]["template"]["metadata"]
    assert metadata["labels"]["team"] == "a"
    assert metadata["annotations"]["note"] == "b"


def test_image_is_a_version_or_a_digest() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert container(render())["image"] == f"lowbit:{version}-cpu"
    assert container(render(gpu={"count": 1}))["image"] == f"lowbit:{version}-gpu"
    assert container(render(image={"tag": "1.2"}))["image"] == "lowbit:1.2"
    assert container(render("one-gpu", image={"tag": "1.2"}))["image"].startswith("lowbit@sha256:")
