"""Tiny checkpoint directories, a clock that tests turn by hand, and an engine that is not vLLM."""

import json
import struct
from asyncio import AbstractEventLoop
from collections.abc import Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest
import uvloop
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter

from lowbit_core.manifest import (
    BaseModelRecord,
    GateRecord,
    KVCacheRecord,
    KVLayerRecord,
    Manifest,
    ModuleRecord,
    QualityRecord,
    RunRecord,
    SizeRecord,
    TextRecord,
    write_manifest,
)
from lowbit_core.manifest_files import record_files
from lowbit_server.engine.interface import EngineFacts, LayerKind
from lowbit_server.engine.kv_scales import KVScale
from lowbit_server.engine.memory import DeviceMemory
from lowbit_server.shadow.divergence import LogProbs

LAYERS = 2
SCALES = (KVScale(0, 0.03125, 0.015625), KVScale(1, 0.1, 0.007))
KV_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 128,
    "max_position_embeddings": 2048,
    "dtype": "bfloat16",
    "quantization_config": {"quant_method": "compressed-tensors", "kv_cache_scheme": KV_SCHEME},
}
TEXT = TextRecord(dataset="test", num_samples=1, max_seq_length=8, tokens=8, seed=0, sha256="0" * 64)


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], AbstractEventLoop]]:
    """Tests run on uvloop, as `lowbit serve` does: sockets end differently on asyncio's own loop."""
    return {"uvloop": uvloop.new_event_loop}


class MakeCheckpoint(Protocol):
    def __call__(
        self,
        *,
        manifest: bool = True,
        accepted: bool = True,
        mean_kld: float = 0.0835,
        config: dict[str, Any] | None = None,
    ) -> Path: ...


@pytest.fixture
def scales() -> dict[int, KVScale]:
    """The KV scales of every checkpoint that `make_checkpoint` writes."""
    return {scale.layer: scale for scale in SCALES}


@pytest.fixture
def facts() -> EngineFacts:
    return FACTS


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """Writes a directory with a config, KV scales as the only tensors, and (if asked) a manifest."""

    def make(
        *,
        manifest: bool = True,
        accepted: bool = True,
        mean_kld: float = 0.0835,
        config: dict[str, Any] | None = None,
    ) -> Path:
        directory = tmp_path / "tiny-w4a16"
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(CONFIG | (config or {})))
        write_scales(directory / "model.safetensors", SCALES)
        if manifest:
            write_manifest(directory, _manifest(directory, accepted, mean_kld))
        return directory

    return make


def write_scales(path: Path, scales: tuple[KVScale, ...], dtype: str = "F32") -> None:
    """A safetensors file that holds one k_scale and one v_scale for each layer."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for scale in scales:
        for side, value in (("k", scale.k_scale), ("v", scale.v_scale)):
            raw = struct.pack("<f", value)
            raw = raw[2:] if dtype == "BF16" else raw
            name = f"model.layers.{scale.layer}.self_attn.{side}_scale"
            header[name] = {"dtype": dtype, "shape": [1], "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def _manifest(directory: Path, accepted: bool, mean_kld: float) -> Manifest:
    quality = QualityRecord(
        heldout=TEXT, predictions=7, mean_kld=mean_kld, kld_stderr=0.001, kld_p99=0.5, kld_max=1.0,
        top1_agreement=0.875, top1_stderr=0.01, perplexity_base=10.0, perplexity=11.0, perplexity_ratio=1.1,
        domains={"prose": {"sequences": 1.0, "mean_kld": mean_kld}}, kv_cache_included=True,
    )  # fmt: skip
    return Manifest(
        created="2026-11-22T00:00:00Z",
        base=BaseModelRecord(
            name="org/Tiny-Chat",
            kind="directory",
            revision=None,
            model_type="llama",
            dtype="bfloat16",
            sha256={},
        ),
        recipe={},
        size=SizeRecord(
            parameters=1000, base_bytes=2000, bytes=600, quantized_parameters=900, linear_bits_per_weight=4.25
        ),
        modules=[
            _module("model.layers.0.self_attn.q_proj", "awq", "gptq"),
            _module("model.layers.0.mlp.up_proj", "rtn"),
        ],
        kv_cache=KVCacheRecord(
            dtype="fp8_e4m3",
            source="calibration",
            layers=[KVLayerRecord(layer=s.layer, k_scale=s.k_scale, v_scale=s.v_scale) for s in SCALES],
        ),
        calibration=TEXT,
        quality=quality,
        gate=GateRecord(
            limits={"mean_kld": 0.05},
            accepted=accepted,
            reasons=[] if accepted else ["mean KLD 0.0835 is above 0.05"],
        ),
        files=record_files(directory),
        versions={},
        run=RunRecord(device="cpu", seconds=1.0, cpu_seconds=1.0, peak_rss_bytes=1),
    )


def _module(name: str, *methods: str) -> ModuleRecord:
    return ModuleRecord(
        name=name,
        scheme="W4A16",
        bits=4,
        group_size=64,
        symmetric=True,
        methods=list(methods),
        error=0.01,
        alpha=None,
    )


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


FACTS = EngineFacts(
    vllm="0.0.0",
    device="cpu",
    quantization="compressed-tensors",
    dtype="bfloat16",
    kv_cache_dtype="fp8",
    kv_tokens=4096,
    max_model_len=2048,
    max_num_seqs=16,
    kv_scales=SCALES,
    input_scales=(),
    layers=(LayerKind("QKVParallelLinear", "CompressedTensorsWNA16", "WNA16Kernel", 30),),
)
MEMORY = (
    DeviceMemory(
        "cpu", weights_bytes=600, kv_cache_bytes=1000, free_bytes=5000, total_bytes=9000,
        graphs_bytes=70, activation_peak_bytes=300,
    ),
)  # fmt: skip


class FakeEngine:
    """Answers like `lowbit_server.engine.vllm_engine.Engine`, with routes as vLLM registers them."""

    def __init__(self, facts: EngineFacts = FACTS) -> None:
        self.dead = False
        self._facts = facts
        self._registry = CollectorRegistry()
        Counter("vllm:prompt_tokens", "Prompt tokens.", registry=self._registry).inc(7)

    @property
    def lifespan(self) -> Callable[[FastAPI], Any]:
        @asynccontextmanager
        async def lifespan(_app: FastAPI) -> Any:
            yield

        return lifespan

    def metrics_registry(self) -> CollectorRegistry:
        return self._registry

    async def attach_openai_api(self, app: FastAPI) -> None:
        for path in (
            "/v1/models",
            "/v1/chat/completions",
            "/health",
            "/metrics",
            "/scale_elastic_ep",
            "/load",
        ):
            method = "POST" if path == "/v1/chat/completions" else "GET"
            app.add_api_route(path, lambda: {"from": "vllm"}, methods=[method])

    async def models(self) -> list[dict[str, Any]]:
        base = {"id": "Tiny-Chat", "object": "model", "root": "/secret/path", "parent": None}
        return [base, {"id": "poet", "object": "model", "root": "/adapters/poet", "parent": "Tiny-Chat"}]

    async def memory(self) -> tuple[DeviceMemory, ...]:
        return MEMORY

    async def facts(self) -> EngineFacts:
        return self._facts

    async def score(self, tokens: Sequence[int], first: int, top: int) -> list[LogProbs]:
        return [{token: -0.5, top: -1.0} for token in tokens[first:]]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()
