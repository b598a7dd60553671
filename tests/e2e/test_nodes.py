"""Two rendered pods that hold one model together, run: their answers, and the alert when the engine is killed.

In a file of its own, because it does not need the demo and may run beside it. Prometheus is the real one, under the
rendered rules; only their hold times are shortened.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
import yaml
from scripts.demo import MODEL
from tests.e2e.pods import LOOPBACK, QUICK_START, running
from tests.e2e.streams import until
from tests.e2e.test_families import SMALL
from tests.helm.chart import Resource, render, templates
from tests.helm.expressions import every_expression
from tests.tiny_models import CONTEXT, SENTENCES, write_tiny_model

from lowbit_core.server_process import free_port
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.recipe import load_recipe

pytestmark = pytest.mark.engine

PROMETHEUS = shutil.which("prometheus") or shutil.which("prometheus", path=str(Path(sys.executable).parent))
HOLD_S = 5
LABELS = {"namespace": "models", "job": "demo-lowbit"}  # what a ServiceMonitor gives


@pytest.fixture(scope="module")
def sentences_by_heart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized tiny model, with a scale for each layer's FP8 cache, whose parts have even sizes."""
    root = tmp_path_factory.mktemp("nodes")
    write_tiny_model(root / "base", sentences=SENTENCES, intermediate_size=256)
    quantize(str(root / "base"), load_recipe("awq-g64", SMALL), root / "out", torch.device("cpu"))
    return root / "out"


@contextmanager
def prometheus(target: str, rules: Resource, folder: Path) -> Iterator[str]:
    """The URL of a Prometheus that scrapes `target` every second, under `rules`."""
    folder.mkdir()
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule |= {"for": f"{HOLD_S}s"} if "for" in rule else {}
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
    scrape = {
        "job_name": LABELS["job"],
        "static_configs": [{"targets": [target], "labels": {"namespace": LABELS["namespace"]}}],
    }
    every = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config = {"global": every, "rule_files": ["rules.yaml"], "scrape_configs": [scrape]}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [str(PROMETHEUS), "--config.file=prometheus.yaml", "--storage.tsdb.path=data"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={LOOPBACK}:{port}"],
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield f"http://{LOOPBACK}:{port}/api/v1"
    finally:
        process.kill()
        process.wait()


def ask(api: str, expression: str) -> list[Any]:
    answer = httpx.get(f"{api}/query", params={"query": expression}).json()
    assert answer["status"] == "success", answer
    return list(answer["data"]["result"])


def firing(api: str) -> dict[str, str]:
    """The alerts that are pending or firing."""
    alerts = httpx.get(f"{api}/alerts").json()["data"]["alerts"]
    return {alert["labels"]["alertname"]: alert["state"] for alert in alerts}


@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed; scripts/prometheus fetches it")
def test_two_rendered_nodes_serve_one_model_and_a_killed_engine_raises_the_alert(
    sentences_by_heart: Path, tmp_path: Path
) -> None:
    resources = render(
        "multi-node",
        gpu={"count": 0},  # one CPU in each pod instead of four GPUs
        parallel={"tensorSize": 2, "pipelineSize": 1},
        server=QUICK_START | {"maxModelLen": 512, "gpuMemoryUtilization": None, "kvCacheGib": 0.0625},
        extraEnv=[{"name": "GLOO_SOCKET_IFNAME", "value": "lo"}],
    )
    resources["ConfigMap"]["data"]["LOWBIT_MASTER_PORT"] = str(free_port())  # two pods here share one network
    leader, follower = templates(resources)
    group = {"LWS_LEADER_ADDRESS": LOOPBACK}
    with ExitStack() as stack:
        start = stack.enter_context
        nodes = [
            start(
                running(
                    resources, template, sentences_by_heart, free_port(), tmp_path / rank,
                    **group, LWS_WORKER_INDEX=rank,
                )
            )
            for rank, template in (("0", leader), ("1", follower))
        ]  # fmt: skip
        nodes[0].wait_until_started()
        rules = resources["PrometheusRule"]["spec"]
        api = start(prometheus(nodes[0].url.removeprefix("http://"), rules, tmp_path / "prometheus"))

        asked = {"model": MODEL, "max_tokens": 20, "temperature": 0, "return_token_ids": True}
        for sentence in SENTENCES.tolist():
            prompt = {"prompt": sentence[:CONTEXT]}
            answer = httpx.post(f"{nodes[0].url}/v1/completions", json=asked | prompt, timeout=60).json()
            assert answer["choices"][0]["token_ids"] == sentence[CONTEXT : CONTEXT + 20]
        facts = httpx.get(f"{nodes[0].url}/lowbit/checkpoint").json()["engine"]
        assert facts["kv_scales_in_force"] == "checkpoint"
        assert facts["memory"].keys() == {"node0/cpu", "node1/cpu"}

        until(lambda: bool(ask(api, "lowbit:queue_depth")), 30)
        for expression in every_expression():
            ask(api, expression)
        assert len(ask(api, "lowbit:memory_use")) == len(nodes)
        assert "LowbitEngineDown" not in firing(api)
        engine = next(p for p in psutil.Process(nodes[0].process.pid).children() if "EngineCore" in p.name())
        engine.kill()
        pending_s = until(lambda: "LowbitEngineDown" in firing(api), 30)
        firing_s = until(lambda: firing(api).get("LowbitEngineDown") == "firing", 30) + pending_s
        assert nodes[0].process.wait(30) == 1
        assert nodes[1].process.wait(60) == 1
        assert "the leader is gone" in nodes[1].log.read_text()
    print(
        f"LowbitEngineDown pending after {pending_s:.1f} s and firing after {firing_s:.1f} s, held {HOLD_S} s"
    )
