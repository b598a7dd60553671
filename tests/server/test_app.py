"""Our app around an engine that is not vLLM: its routes, health, metrics, and the checkpoint document."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from lowbit_core import __version__
from lowbit_core.errors import EngineError
from lowbit_core.manifest import MANIFEST_NAME
from lowbit_server.app import build_app, inspect_engine
from lowbit_server.checkpoint import open_checkpoint
from lowbit_server.config import ServeConfig
from lowbit_server.cost.energy import EnergyMeter, EnergyReading
from lowbit_server.cost.price import Cost
from lowbit_server.cost.usage_book import UsageBook
from lowbit_server.cost.usage_file import Counts, open_usage_file
from lowbit_server.engine.nvml import GpuMemory
from lowbit_server.engine.throughput import Throughput
from lowbit_server.gateway.key_limits import KeyUsage
from lowbit_server.gateway.keys import ANONYMOUS, Key
from lowbit_server.gateway.lease import Capacity, Lease
from lowbit_server.gateway.request_context import RequestContext
from lowbit_server.gateway.request_tracker import RequestTracker
from lowbit_server.production import Production
from lowbit_server.report import kv_scales_in_words
from lowbit_server.shadow.base_endpoint import BaseEndpoint
from lowbit_server.shadow.divergence import Position
from lowbit_server.shadow.worker import Shadow

if TYPE_CHECKING:
    from tests.server.conftest import Clock, FakeEngine, MakeCheckpoint

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


class Running:
    """An app with its engine and its throughput, asked without a socket."""

    def __init__(self, app: FastAPI, throughput: Throughput, production: Production) -> None:
        self.draining = False
        self.throughput, self.production = throughput, production
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")

    async def get(self, path: str) -> httpx.Response:
        return await self._client.get(path)

    async def samples(self) -> dict[str, float]:
        """Each sample of `/metrics` as `name{label=value,…}`."""
        text = (await self.get("/metrics")).text
        found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {
            f"{s.name}{{{','.join(f'{k}={v}' for k, v in sorted(s.labels.items()))}}}": s.value for s in found
        }


WEIGHTS = {"scheme": "W4A16", "bits": "4", "group_size": "64", "methods": "awq+gptq+rtn"}


async def start(
    engine: "FakeEngine", directory: Path, clock: Callable[[], float], *, allow_rejected: bool = False
) -> Running:
    config = ServeConfig(directory, allow_rejected=allow_rejected)
    service = await inspect_engine(engine, config, open_checkpoint(config))
    throughput = Throughput(10.0, clock)
    running: Running
    tracker = RequestTracker(write_log=False)
    capacity, usage = Capacity(1, 1, lambda: 1), KeyUsage(ANONYMOUS, clock)
    context = RequestContext("/v1/chat/completions", "", Lease(capacity, usage))
    tracker.open(context)
    tracker.engine_finished(f"chatcmpl-{context.id}", 3, 4, 2)
    context.outcome = "ok"
    tracker.close(context)
    tracker.reject(RequestContext("/v1/chat/completions", "", Lease(capacity, usage)), 401, "key")
    gpus = (GpuMemory(0, "GPU-a", total=80, used=30, free=50),)
    production = everything(directory, clock)
    app = await build_app(
        engine, service, throughput, tracker, lambda: gpus, lambda: running.draining, production
    )
    running = Running(app, throughput, production)
    return running


def everything(directory: Path, clock: Callable[[], float]) -> Production:
    """Every part of what may be asked for, each with something to tell."""
    book = UsageBook(open_usage_file(directory.parent / "usage.db"))
    book.add("limited", Counts(1, 10, 20, 5))
    limited = Key(name="limited", sha256="0" * 64, tokens_per_month=100)
    since = iter((0.0, 7.0))
    energy = EnergyMeter([lambda: [EnergyReading("rapl", "package-0", next(since, 9.0))]])
    energy.read()
    cost = Cost(3.6, clock)
    cost.begin()
    shadow = Shadow(BaseEndpoint("http://base"), lambda: True, 100)
    for nats in (0.1, 0.3):
        shadow.divergence.add([Position(nats, 0.05)] * 2)
    return Production(energy, cost, book, lambda: [limited], shadow)


@pytest.fixture
async def running(engine: "FakeEngine", make_checkpoint: "MakeCheckpoint", clock: "Clock") -> Running:
    return await start(engine, make_checkpoint(), clock)


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/livez", "/readyz", "/openapi.json"])
async def test_allowed_routes_answer(running: Running, path: str) -> None:
    assert (await running.get(path)).status_code == 200


@pytest.mark.parametrize("path", ["/scale_elastic_ep", "/load", "/docs"])
async def test_routes_that_nobody_asked_for_are_gone(running: Running, path: str) -> None:
    assert (await running.get(path)).status_code == 404


async def test_draining_server_lives_but_is_not_ready(running: Running) -> None:
    running.draining = True
    ready = await running.get("/readyz")
    assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
    assert (await running.get("/livez")).status_code == 200


async def test_dead_engine_is_neither_live_nor_ready(running: Running, engine: "FakeEngine") -> None:
    engine.dead = True
    assert [(await running.get(path)).status_code for path in ("/livez", "/readyz")] == [503, 503]


async def test_metrics_are_vllms_and_ours_in_one_exposition(running: Running) -> None:
    running.throughput.record(prompt_tokens=70, generation_tokens=30)
    samples = await running.samples()
    assert samples["vllm:prompt_tokens_total{}"] == 7
    assert samples["lowbit_prompt_tokens_per_second{model=Tiny-Chat}"] == 7
    assert samples["lowbit_generation_tokens_per_second{model=Tiny-Chat}"] == 3
    assert samples["lowbit_memory_bytes{component=weights,device=cpu}"] == 600
    assert samples["lowbit_memory_bytes{component=kv_cache,device=cpu}"] == 1000
    assert samples["lowbit_memory_bytes{component=graphs,device=cpu}"] == 70
    assert samples["lowbit_memory_bytes{component=activation_peak,device=cpu}"] == 300
    assert samples["lowbit_memory_bytes{component=other,device=cpu}"] == 9000 - 5000 - 600 - 1000 - 70
    assert samples["lowbit_memory_bytes{component=free,device=cpu}"] == 5000
    assert samples["lowbit_memory_bytes{component=total,device=cpu}"] == 9000
    assert samples["lowbit_energy_joules_total{device=package-0,source=rapl}"] == 7
    assert samples["lowbit_price_per_hour{model=Tiny-Chat}"] == 3.6
    assert samples["lowbit_key_month_tokens{key=limited}"] == 30
    assert samples["lowbit_key_month_quota_tokens{key=limited}"] == 100
    assert samples["lowbit_usage_write_failures_total{}"] == 0
    assert samples["lowbit_key_cached_tokens_total{key=anonymous}"] == 2
    assert samples["lowbit_gateway_overhead_seconds_count{}"] == 1
    assert samples["lowbit_shadow_kld{model=Tiny-Chat}"] == pytest.approx(0.2)
    assert samples["lowbit_shadow_kld_stderr{model=Tiny-Chat}"] == pytest.approx(0.1)
    assert samples["lowbit_shadow_remainder{model=Tiny-Chat}"] == pytest.approx(0.05)
    assert samples["lowbit_shadow_nats_total{model=Tiny-Chat}"] == pytest.approx(0.8)
    assert samples["lowbit_shadow_tokens_total{model=Tiny-Chat}"] == 4
    assert samples["lowbit_shadow_answers_total{outcome=scored}"] == 0
    assert samples["lowbit_kv_cache_tokens{model=Tiny-Chat}"] == 4096
    assert samples["lowbit_requests_total{key=anonymous,outcome=ok}"] == 1
    assert samples["lowbit_key_tokens_total{key=anonymous,kind=generated}"] == 4
    assert samples["lowbit_key_tokens_per_second{key=anonymous,kind=generated}"] == pytest.approx(4 / 60)
    assert samples["lowbit_nvml_memory_bytes{gpu=0,kind=used,uuid=GPU-a}"] == 30
    assert samples[f"lowbit_build_info{{device=cpu,version={__version__},vllm=0.0.0}}"] == 1
    assert samples["lowbit_rejections_total{reason=key}"] == 1
    assert samples["lowbit_draining{model=Tiny-Chat}"] == 0
    assert samples["lowbit_checkpoint_mean_kld{model=Tiny-Chat}"] == 0.0835
    assert samples["lowbit_checkpoint_top1_agreement{model=Tiny-Chat}"] == 0.875
    info = (
        "accepted=true,base=org/Tiny-Chat,bits=4,group_size=64,kv_dtype=fp8,kv_scales=checkpoint,"
        "mean_kld=0.0835,methods=awq+gptq+rtn,model=Tiny-Chat,scheme=W4A16,top1_agreement=0.875"
    )
    assert samples[f"lowbit_checkpoint_info{{{info}}}"] == 1


async def test_models_are_listed_with_the_checkpoints_facts_and_without_paths(running: Running) -> None:
    base, poet = (await running.get("/v1/models")).json()["data"]
    assert base["lowbit"]["quality"]["mean_kld"] == 0.0835
    assert base["lowbit"]["weights"] == WEIGHTS
    assert (base["lowbit"]["kv_cache_dtype"], base["lowbit"]["kv_scales"]) == ("fp8", "checkpoint")
    assert (poet["parent"], "lowbit" in poet) == ("Tiny-Chat", False)
    assert [base["root"], poet["root"]] == ["Tiny-Chat", "poet"]
    assert (await running.get("/v1/models/poet")).json() == poet
    assert (await running.get("/v1/models/other")).status_code == 404


@pytest.mark.parametrize("path", ["/v1/models/org/poet", "/v1/models/org%2Fpoet"])
async def test_a_model_whose_name_holds_a_slash_is_found_under_it(
    engine: "FakeEngine", make_checkpoint: "MakeCheckpoint", clock: "Clock", path: str
) -> None:
    class Slashed(type(engine)):  # type: ignore[misc]
        async def models(self) -> list[dict[str, Any]]:
            return [{"id": "org/poet", "object": "model", "root": "/secret", "parent": None}]

    found = (await (await start(Slashed(), make_checkpoint(), clock)).get(path)).json()
    assert (found["id"], found["root"]) == ("org/poet", "org/poet")


async def test_the_openapi_document_names_each_status_and_no_closed_route(running: Running) -> None:
    document = (await running.get("/openapi.json")).json()
    assert set(document["paths"]) == {
        "/health", "/livez", "/readyz", "/startupz", "/metrics", "/lowbit/checkpoint", "/lowbit/live", "/lowbit/proof",
        "/v1/models", "/v1/models/{model}", "/v1/chat/completions",
        "/ping", "/invocations",
    }  # fmt: skip
    chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert {"200", "401", "403", "404", "431", "500"} <= set(chat)
    assert chat["401"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}
    assert document == (await running.get("/openapi.json")).json()


async def test_the_pages_feed_has_the_joules_that_the_devices_used(running: Running) -> None:
    assert (await running.get("/lowbit/live")).json()["energy_joules"] == 7


async def test_metrics_page_is_prometheus_text(running: Running) -> None:
    assert (await running.get("/metrics")).headers["content-type"].startswith("text/plain; version=")


async def test_every_metric_is_documented_and_every_documented_one_exists(running: Running) -> None:
    assert running.production.cost is not None
    running.production.cost.add(7, 5)
    families = text_string_to_metric_families((await running.get("/metrics")).text)
    exposed = {
        one.name + "_total" * (one.type == "counter") for one in families if one.name.startswith("lowbit_")
    }
    documented = {
        line.split("`")[1] for line in DOCS.read_text().splitlines() if line.startswith("| `lowbit_")
    }
    assert documented == exposed


async def test_unknown_quality_has_no_quality_metrics(
    engine: "FakeEngine", make_checkpoint: "MakeCheckpoint", clock: "Clock"
) -> None:
    running = await start(engine, make_checkpoint(manifest=False), clock)
    samples = await running.samples()
    assert not [name for name in samples if name.startswith(("lowbit_checkpoint_m", "lowbit_checkpoint_t"))]
    assert (await running.get("/v1/models")).json()["data"][0]["lowbit"]["quality"] is None
    assert (await running.get("/lowbit/checkpoint")).json()["manifest"] is None


async def test_checkpoint_document_holds_measured_and_running_facts(running: Running) -> None:
    document: dict[str, Any] = (await running.get("/lowbit/checkpoint")).json()
    engine = document["engine"]
    assert document["model"] == "Tiny-Chat"
    assert document["manifest"]["quality"]["mean_kld"] == 0.0835
    assert document["manifest"]["weights"] == WEIGHTS
    assert (engine["kv_tokens"], engine["kv_cache_dtype"]) == (4096, "fp8")
    assert engine["kv_scales"][0] == {"layer": 0, "k_scale": 0.03125, "v_scale": 0.015625, "fp8": True}
    assert engine["kv_scales_in_force"] == "checkpoint"
    assert engine["memory"]["cpu"] == {
        "weights": 600, "kv_cache": 1000, "graphs": 70, "activation_peak": 300, "other": 2330, "free": 5000,
        "total": 9000,
    }  # fmt: skip
    json.dumps(document, allow_nan=False)


async def test_a_rejected_checkpoint_whose_divergence_is_not_finite_can_still_be_asked_about(
    engine: "FakeEngine", make_checkpoint: "MakeCheckpoint", clock: "Clock"
) -> None:
    """JSON has no such number; they are strings, as in the manifest."""
    directory = make_checkpoint(accepted=False, mean_kld=math.nan)
    running = await start(engine, directory, clock, allow_rejected=True)
    quality = (await running.get("/lowbit/checkpoint")).json()["manifest"]["quality"]
    assert (quality["mean_kld"], quality["domains"]["prose"]["mean_kld"]) == ("NaN", "NaN")
    card = (await running.get("/v1/models")).json()["data"][0]["lowbit"]["quality"]
    assert (card["mean_kld"], card["accepted"]) == ("NaN", False)


async def test_a_format_without_kv_scales_is_served_with_unit_scales_and_says_so(
    engine: "FakeEngine", make_checkpoint: "MakeCheckpoint", clock: "Clock"
) -> None:
    directory = make_checkpoint(config={"quantization_config": {"quant_method": "awq"}})
    facts = await engine.facts()
    units = tuple(replace(scale, k_scale=1.0, v_scale=1.0) for scale in facts.kv_scales)
    config, unit_engine = ServeConfig(directory), type(engine)(replace(facts, kv_scales=units))
    running = await start(unit_engine, directory, clock)
    document = (await running.get("/lowbit/checkpoint")).json()
    assert document["engine"]["kv_scales_in_force"] == "unit"
    service = await inspect_engine(unit_engine, config, open_checkpoint(config))
    line = "KV scales: this awq checkpoint carries none; the FP8 cache of all 2 layers runs with scale 1, "
    assert kv_scales_in_words(service) == line + "which was not measured"


async def test_engine_with_other_scales_is_not_served(
    engine: "FakeEngine", make_checkpoint: "MakeCheckpoint", clock: "Clock"
) -> None:
    facts = await engine.facts()
    wrong = tuple(replace(scale, v_scale=1.0) for scale in facts.kv_scales)
    with pytest.raises(EngineError, match="layer 0: the engine runs with v_scale 1"):
        await start(type(engine)(replace(facts, kv_scales=wrong)), make_checkpoint(), clock)


async def test_a_newer_manifest_with_more_optional_fields_is_served_as_before(
    engine: "FakeEngine", make_checkpoint: "MakeCheckpoint", clock: "Clock"
) -> None:
    directory = make_checkpoint()
    before = await start(engine, directory, clock)
    known = [(await before.get(path)).json() for path in ("/lowbit/checkpoint", "/v1/models")]
    path = directory / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    for part in (manifest, manifest["quality"], manifest["modules"][0], manifest["kv_cache"]["layers"][0]):
        part["added_in_a_later_version"] = {"any": ["thing"]}
    path.write_text(json.dumps(manifest))
    after = await start(engine, directory, clock)
    assert [(await after.get(path)).json() for path in ("/lowbit/checkpoint", "/v1/models")] == known
    assert await after.samples() == await before.samples()
