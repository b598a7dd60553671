"""The page's feed: the load of this moment from the engine's own gauges, and the proof from the manifest."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lowbit_core.manifest import MANIFEST_NAME
from lowbit_server.app import build_app, inspect_engine
from lowbit_server.checkpoint import open_checkpoint
from lowbit_server.config import ServeConfig
from lowbit_server.engine.memory import DeviceMemory
from lowbit_server.engine.throughput import Throughput
from lowbit_server.gateway.request_tracker import RequestTracker
from lowbit_server.live import Live, proof_document
from lowbit_server.production import Production
from lowbit_server.report import Service

if TYPE_CHECKING:
    from tests.server.conftest import Clock, FakeEngine, MakeCheckpoint

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


async def service_of(engine: "FakeEngine", directory: Path, *, allow_rejected: bool = False) -> Service:
    config = ServeConfig(directory, allow_rejected=allow_rejected)
    return await inspect_engine(engine, config, open_checkpoint(config))


def live_of(service: Service, registry: CollectorRegistry, clock: "Clock", **given: Any) -> Live:
    memory = (DeviceMemory("cpu", weights_bytes=1, kv_cache_bytes=2, free_bytes=3, total_bytes=10),)
    throughput = Throughput(10.0, clock)
    throughput.record(prompt_tokens=70, generation_tokens=30)
    tracker = RequestTracker(write_log=False)
    return Live(service, throughput, tracker, registry, lambda: memory, lambda: False, clock=clock, **given)


def registry_of(engines: int) -> CollectorRegistry:
    """vLLM's gauges for so many engines, and a metric that nobody may collect for this."""
    registry = CollectorRegistry()
    labels = ["model_name", "engine"]
    for kind, name, value in (
        (Counter, "prompt_tokens", 50), (Counter, "generation_tokens", 200), (Gauge, "num_requests_running", 3),
        (Gauge, "num_requests_waiting", 2), (Gauge, "kv_cache_usage_perc", 0.5),
    ):  # fmt: skip
        metric = kind(f"vllm:{name}", name, labels, registry=registry)
        for number in range(engines):
            metric.labels("m", str(number)).inc(value)

    class Costly(Histogram):
        def collect(self) -> Any:
            raise AssertionError("collected for the feed")

    Costly("vllm:e2e_request_latency_seconds", "all", registry=registry)
    return registry


@pytest.mark.parametrize("engines", [1, 3])
async def test_the_feed_has_the_engines_gauges_and_collects_no_others(
    engine: "FakeEngine", make_checkpoint: "MakeCheckpoint", clock: "Clock", engines: int
) -> None:
    live = live_of(await service_of(engine, make_checkpoint()), registry_of(engines), clock)
    clock.now_s += 2.5
    assert live.document() == {
        "model": "Tiny-Chat",
        "status": "ready",
        "up_s": 2.5,
        "tokens": {"prompt": 50 * engines, "generated": 200 * engines},
        "tokens_per_second": {"prompt": 7.0, "generated": 3.0},
        "requests": {"active": 0, "running": 3 * engines, "waiting": 2 * engines},
        "kv_cache": {"tokens": 4096, "used": 0.5},
        "memory": {"cpu": {"weights": 1, "kv_cache": 2, "other": 4, "free": 3, "total": 10}},
    }


async def test_what_the_engine_does_not_say_is_null_and_joules_are_there_where_they_are_known(
    engine: "FakeEngine", make_checkpoint: "MakeCheckpoint", clock: "Clock"
) -> None:
    service = await service_of(engine, make_checkpoint())
    document = live_of(service, CollectorRegistry(), clock, energy_joules=lambda: 12.5).document()
    assert document["tokens"] == {"prompt": None, "generated": None}
    assert document["kv_cache"] == {"tokens": 4096, "used": None}
    assert document["energy_joules"] == 12.5


async def test_the_proof_has_what_was_measured_and_what_is_in_force(
    engine: "FakeEngine", make_checkpoint: "MakeCheckpoint"
) -> None:
    proof = proof_document(await service_of(engine, make_checkpoint()))
    manifest = proof["manifest"]
    assert (manifest["quality"]["mean_kld"], manifest["quality"]["kld_stderr"]) == (0.0835, 0.001)
    assert manifest["gate"] == {"limits": {"mean_kld": 0.05}, "accepted": True, "reasons": []}
    assert [(one["scheme"], one["linears"]) for one in manifest["groups"]] == [("W4A16", 1), ("W4A16", 1)]
    assert [(one["role"], one["layers"]) for one in manifest["roles"]] == [
        ("self_attn.q_proj", [{"layer": 0, "scheme": "W4A16", "error": 0.01}]),
        ("mlp.up_proj", [{"layer": 0, "scheme": "W4A16", "error": 0.01}]),
    ]
    assert proof["kv_scales"]["in_force"] == "checkpoint"
    assert proof["kv_scales"]["layers"][1] == {"layer": 1, "k": 0.1, "v": 0.007}
    assert proof["engine"]["kernels"] == [
        "WNA16Kernel computes 30 layers (QKVParallelLinear; CompressedTensorsWNA16)"
    ]
    assert not {"sha256", "recipe", "files_by_name"} & set(json.dumps(proof).split('"'))


async def test_experts_of_a_layer_are_one_row_and_a_divergence_that_is_not_finite_is_still_json(
    engine: "FakeEngine", make_checkpoint: "MakeCheckpoint"
) -> None:
    directory = make_checkpoint(accepted=False, mean_kld=math.nan)
    path = directory / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    one = manifest["modules"][0]
    manifest["modules"] = [
        one | {"name": f"model.layers.{layer}.mlp.experts.{expert}.up_proj", "error": error}
        for layer in range(2)
        for expert, error in enumerate((0.25, 0.75, "NaN"))
    ]
    path.write_text(json.dumps(manifest))
    proof = proof_document(await service_of(engine, directory, allow_rejected=True))
    (role,) = proof["manifest"]["roles"]
    assert (role["role"], role["linears"]) == ("mlp.experts.*.up_proj", 6)
    assert [one["error"] for one in role["layers"]] == [0.5, 0.5]
    assert proof["manifest"]["quality"]["mean_kld"] == "NaN"
    json.dumps(proof, allow_nan=False)


@pytest.mark.parametrize("page", [True, False])
async def test_without_the_page_its_feed_is_gone_too(
    engine: "FakeEngine", make_checkpoint: "MakeCheckpoint", page: bool
) -> None:
    service = await service_of(engine, make_checkpoint())
    tracker = RequestTracker(write_log=False)
    app = await build_app(
        engine, service, Throughput(), tracker, lambda: (), lambda: False, Production(), page=page
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        for path in ("/lowbit/live", "/lowbit/proof"):
            assert (await client.get(path)).status_code == (200 if page else 404)


async def test_the_documentation_names_every_field_of_both_documents(
    engine: "FakeEngine", make_checkpoint: "MakeCheckpoint", clock: "Clock"
) -> None:
    service = await service_of(engine, make_checkpoint())
    live = live_of(service, registry_of(1), clock, energy_joules=lambda: 1.0).document()
    text = DOCS.read_text()
    for document in (live, proof_document(service)):
        for name, value in document.items():
            assert f'"{name}"' in text, name
            if name not in ("memory", "manifest") and isinstance(value, dict):
                assert all(f'"{inner}"' in text for inner in value), name
