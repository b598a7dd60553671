"""What the rest of the server needs from a running engine; tests hand in one that is not vLLM."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fastapi import FastAPI

from lowbit_server.engine.kv_scales import KVScale
from lowbit_server.engine.memory import DeviceMemory
from lowbit_server.lifecycle import Liveness
from lowbit_server.shadow.divergence import LogProbs

Rounded = Literal[
    "none", "int", "float"
]  # the numbers that an engine rounds the inputs of quantized experts to


@dataclass(frozen=True)
class LayerKind:
    """So many layers of one type (vLLM's class), how they are quantized, and the kernel that computes them."""

    layer: str
    method: str | None
    kernel: str | None
    count: int


@dataclass(frozen=True)
class EngineFacts:
    """Read back once from the running engine; `kv_tokens` is the capacity of its KV cache."""

    vllm: str
    device: str
    quantization: str | None
    dtype: str
    kv_cache_dtype: str
    kv_tokens: int
    max_model_len: int
    max_num_seqs: int
    kv_scales: tuple[KVScale, ...]
    input_scales: tuple[Mapping[str, Any], ...]
    layers: tuple[LayerKind, ...]


class ServingEngine(Liveness, Protocol):
    """A running engine: its OpenAI routes, its metrics, and what its workers say about themselves."""

    @property
    def lifespan(self) -> Any: ...
    def metrics_registry(self) -> Any: ...
    async def attach_openai_api(self, app: FastAPI) -> None: ...
    async def models(self) -> list[dict[str, Any]]: ...
    async def memory(self) -> tuple[DeviceMemory, ...]: ...
    async def facts(self) -> EngineFacts: ...
    async def score(self, tokens: Sequence[int], first: int, top: int) -> list[LogProbs]: ...
