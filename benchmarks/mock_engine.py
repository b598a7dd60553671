"""`lowbit serve` with vLLM's place taken by an engine that only waits: all that is ours, and no model.

    python benchmarks/mock_engine.py serve DIR …          # `folder(DIR)` writes what DIR needs

Each step takes STEP_S and gives every running request one token. A piece of a stream says when it was made (`created`)
and when the engine got its request (`received`), in nanoseconds of the monotonic clock. What a request's `seed` says
goes wrong: 1 is refused as vLLM refuses, 2 raises. This revision's names are known and those of ca07873, so that both
can be measured.
"""

import asyncio
import contextlib
import importlib.util
import json
import struct
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import fields
from pathlib import Path
from typing import Any

STEP_S = 0.03
REFUSE, RAISE = 1, 2
MODEL = "mock"
NEW = "lowbit_server.engine.vllm_engine"
CONFIG = {
    "model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
    "hidden_size": 64, "vocab_size": 64, "max_position_embeddings": 8192, "dtype": "bfloat16",
}  # fmt: skip
CHUNK = (
    b'data: {"id":"%s","object":"chat.completion.chunk","created":%%d,"received":%d,"model":"mock","choices":[{"index":'
    b'0,"delta":{"content":" a"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
)


def folder(path: Path) -> Path:
    """A checkpoint directory that passes `lowbit serve`'s checks and that nothing reads afterwards."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    head = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(4))
    return path


class MockEngine:
    """The `ServingEngine` of lowbit_server/engine/interface.py; `throughput` is told what vLLM would tell it."""

    dead = False

    def __init__(self, throughput: Any) -> None:
        self._throughput, self._running = throughput, set[asyncio.Queue[None]]()

    @property
    def lifespan(self) -> Any:
        @contextlib.asynccontextmanager
        async def lifespan(_app: Any) -> AsyncIterator[None]:
            steps = asyncio.create_task(self._steps())
            yield
            steps.cancel()

        return lifespan

    async def _steps(self) -> None:
        while True:
            await asyncio.sleep(STEP_S)
            self._throughput.record(prompt_tokens=0, generation_tokens=len(self._running))
            for one in self._running:
                one.put_nowait(None)

    async def attach_openai_api(self, app: Any) -> None:
        from fastapi import Request
        from fastapi.responses import JSONResponse, StreamingResponse

        @app.get("/health")  # type: ignore[untyped-decorator]
        async def health() -> dict[str, str]:
            return {}

        @app.post("/v1/chat/completions")  # type: ignore[untyped-decorator]
        async def chat(request: Request) -> Any:
            document = await request.json()
            if document.get("seed") == REFUSE:
                error = {"message": "refused", "type": "BadRequestError", "param": "seed", "code": 400}
                return JSONResponse({"error": error}, status_code=400)
            if document.get("seed") == RAISE:
                raise RuntimeError("the mock engine fails on this request")
            tokens = self._tokens(f"chatcmpl-{request.headers['x-request-id']}", document)
            if document.get("stream"):
                return StreamingResponse(tokens, media_type="text/event-stream")
            return JSONResponse(await _unless_left(request, _collected(tokens)))

    async def _tokens(self, name: str, document: dict[str, Any]) -> AsyncIterator[bytes]:
        """The events of a stream; however it ends, its tokens are counted."""
        steps: asyncio.Queue[None] = asyncio.Queue()
        chunk, made = CHUNK % (name.encode(), time.monotonic_ns()), 0
        prompt = len(json.dumps(document["messages"])) // 4
        self._running.add(steps)
        try:
            for _ in range(document.get("max_tokens", 16)):
                await steps.get()
                made += 1
                yield chunk % time.monotonic_ns()
            if (document.get("stream_options") or {}).get("include_usage"):
                usage = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
                last = {"index": 0, "delta": {}, "finish_reason": "length"}
                yield b"data: " + json.dumps({"choices": [last], "usage": usage}).encode() + b"\n\n"
            yield b"data: [DONE]\n\n"
        finally:
            self._running.discard(steps)
            self._throughput.on_finished(name, prompt, made)

    async def models(self) -> list[dict[str, Any]]:
        return [{"id": MODEL, "object": "model", "root": "", "parent": None}]

    def metrics_registry(self) -> Any:
        from prometheus_client import CollectorRegistry

        return CollectorRegistry()

    async def memory(self) -> tuple[Any, ...]:
        return ()

    async def score(self, tokens: Any, first: int, top: int) -> Any:
        raise NotImplementedError("the mock engine has no log-probabilities")

    async def facts(self) -> Any:
        if _is_new():
            from lowbit_server.engine.interface import EngineFacts
        else:
            from lowbit_server.report import EngineFacts  # type: ignore[attr-defined]
        facts: dict[str, Any] = {
            "vllm": "mock", "device": "cpu", "quantization": None, "dtype": "bfloat16", "kv_cache_dtype": "bfloat16",
            "kv_tokens": 1, "max_model_len": 8192, "max_num_seqs": 256, "kv_scales": (), "input_scales": (),
            "layer_methods": {}, "layer_kernels": {}, "layers": (),
        }  # fmt: skip
        return EngineFacts(**{one.name: facts[one.name] for one in fields(EngineFacts)})


async def _collected(tokens: AsyncIterator[bytes]) -> dict[str, Any]:
    made = [one async for one in tokens]
    message = {"role": "assistant", "content": " a" * (len(made) - 1)}
    choice = {"index": 0, "message": message, "finish_reason": "length"}
    return {"object": "chat.completion", "choices": [choice], "usage": {"completion_tokens": len(made) - 1}}


async def _unless_left(request: Any, work: Any) -> dict[str, Any]:
    """The answer, or none where the client has left: then its work is cancelled, as vLLM's is."""
    answer, left = asyncio.ensure_future(work), asyncio.ensure_future(_has_left(request))
    try:
        await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else {}
    finally:
        answer.cancel()
        left.cancel()
        await asyncio.gather(answer, left, return_exceptions=True)


async def _has_left(request: Any) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# What `lowbit serve` asks of lowbit_server/engine/vllm_engine.py


def engine_device() -> str:
    return "cpu"


def known_parsers() -> dict[str, list[str]]:
    return {"--tool-call-parser": [], "--reasoning-parser": []}


def runs_quantized_experts(bits: int, group_size: int, rounded: str = "none") -> bool:
    return True


def runs_fp8_blocks() -> bool:
    return True


@contextlib.asynccontextmanager
async def start_engine(_arguments: Any, throughput: Any, *_: Any) -> AsyncIterator[MockEngine]:
    yield MockEngine(throughput)


@contextlib.asynccontextmanager
async def start_follower(_arguments: Any) -> AsyncIterator[None]:
    yield


def _is_new() -> bool:
    return importlib.util.find_spec("lowbit_server.http") is not None


if __name__ == "__main__":
    sys.modules[NEW if _is_new() else "lowbit_server.engine"] = sys.modules["__main__"]
    from lowbit_core.cli import main

    sys.exit(main())
