"""A stand-in for the engine that says what a test tells it to say, behind the whole gateway and the page, on a port.

Nothing here is a model: answers are given texts, sent word by word as vLLM's stream sends them.
"""

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge
from tests.server.conftest import FACTS, FakeEngine

from lowbit_server.app import build_app, inspect_engine
from lowbit_server.checkpoint import open_checkpoint
from lowbit_server.config import ServeConfig
from lowbit_server.engine.interface import EngineFacts
from lowbit_server.engine.kv_scales import read_checkpoint_scales
from lowbit_server.engine.throughput import Throughput
from lowbit_server.gateway.keys import KeyStore
from lowbit_server.gateway.middleware import Gateway
from lowbit_server.gateway.request_limits import Models, ServerLimits
from lowbit_server.gateway.request_tracker import RequestTracker
from lowbit_server.http.entrance import Entrance
from lowbit_server.http.listeners import bind
from lowbit_server.http.loading import Loading
from lowbit_server.http.serving import serving
from lowbit_server.page.page import Page
from lowbit_server.production import Production

PIECE = re.compile(r"\S+\s*|\s+")
Metric = TypeVar("Metric", Counter, Gauge)
MODELS = ("Tiny-Chat", "poet")


@dataclass
class Script:
    """What the stand-in says next, and what it was asked."""

    text: str = "Hello."
    pause_s: float = 0.005
    reasoning: str = ""
    fails_after: int | None = None  # pieces, after which the stream ends with an error event
    refuses: str | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0  # streams whose client went before the end
    loaded: threading.Event = field(default_factory=threading.Event)  # for `loads_first`


class StandInEngine(FakeEngine):
    """Streams a script's text as a chat's answer and counts it in metrics named as vLLM's are."""

    def __init__(self, script: Script, facts: EngineFacts = FACTS) -> None:
        super().__init__(facts)
        self.script, self._registry = script, CollectorRegistry()
        self._prompt, self._generated = (
            self._metric(Counter, f"{kind}_tokens") for kind in ("prompt", "generation")
        )
        self._running, self._waiting, self._used = (
            self._metric(Gauge, name)
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        )

    def _metric(self, kind: type[Metric], name: str) -> Metric:
        return kind(f"vllm:{name}", name, ["model_name"], registry=self._registry).labels(MODELS[0])

    async def attach_openai_api(self, app: FastAPI) -> None:
        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Any:
            document = await request.json()
            self.script.asked.append(document)
            if self.script.refuses is not None:
                return JSONResponse({"error": {"message": self.script.refuses}}, status_code=400)
            if not document.get("stream"):
                message = {"role": "assistant", "content": self.script.text}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                return JSONResponse({"object": "chat.completion", "choices": [choice]})
            return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[str]:
        self._running.inc()
        self._used.inc(0.25)
        prompt, made, done = 7, 0, False
        self._prompt.inc(prompt)
        kinds = (("reasoning", self.script.reasoning), ("content", self.script.text))
        try:
            for kind, text in kinds:
                for piece in PIECE.findall(text):
                    if made == self.script.fails_after:
                        yield _event({"error": {"message": "the stand-in fails here", "code": 500}})
                        done = True
                        return
                    made += 1
                    self._generated.inc()
                    choice = {"index": 0, "delta": {kind: piece}, "finish_reason": None}
                    yield _event({"choices": [choice], "usage": _usage(prompt, made)})
                    await asyncio.sleep(self.script.pause_s)
            done = True
            last = {"index": 0, "delta": {}, "finish_reason": "stop"}
            yield _event({"choices": [last], "usage": _usage(prompt, made)})
            yield "data: [DONE]\n\n"
        finally:
            self._running.dec()
            self._used.dec(0.25)
            self.script.left += not done


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _usage(prompt: int, made: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


@contextmanager
def serving_the_page(
    directory: Path,
    script: Script,
    *,
    keys: Path | None = None,
    root_path: str = "",
    told: bool = True,
    name: str = MODELS[0],
    loads_first: bool = False,
) -> Iterator[str]:
    """The URL of the page, with its server in a thread of its own.

    `told`: the page knows of the prefix; else a proxy strips it. `loads_first`: it loads until `script.loaded`.
    """
    started: list[str] = []
    ready, loops = threading.Event(), list[tuple[asyncio.AbstractEventLoop, asyncio.Event]]()

    async def run() -> None:
        stop = asyncio.Event()
        loops.append((asyncio.get_running_loop(), stop))
        async with AsyncExitStack() as stack:
            config = ServeConfig(directory, (name,), api_keys=keys, root_path=root_path, allow_rejected=True)
            app, tracker = await _app(config, script)
            listener = stack.enter_context(bind("127.0.0.1", 0))
            gateway = _gateway(app, config, tracker)
            page = Page(root_path if told else "", keys=keys is not None)
            front = Entrance(page.before(Loading() if loads_first else gateway), root_path, 1 << 20)
            await stack.enter_async_context(serving(front, listener, config))
            started.append(f"http://127.0.0.1:{listener.getsockname()[1]}{root_path}")
            ready.set()
            if loads_first:
                await asyncio.to_thread(script.loaded.wait)
                front.open(page.before(gateway))
            await stop.wait()

    thread = threading.Thread(target=_to_the_end, args=(run, ready))
    thread.start()
    ready.wait()
    try:
        yield started[0]
    finally:
        script.loaded.set()
        for loop, stop in loops:
            loop.call_soon_threadsafe(stop.set)
        thread.join()


def _to_the_end(run: Callable[[], Any], ready: threading.Event) -> None:
    try:
        asyncio.run(run())
    finally:
        ready.set()  # also where it could not start


async def _app(config: ServeConfig, script: Script) -> tuple[FastAPI, RequestTracker]:
    scales = read_checkpoint_scales(config.directory)
    engine = StandInEngine(script, replace(FACTS, kv_scales=tuple(scales.values())))
    service = await inspect_engine(engine, config, open_checkpoint(config))
    tracker = RequestTracker(write_log=False)
    return await build_app(
        engine, service, Throughput(), tracker, lambda: (), lambda: False, Production()
    ), tracker


def _gateway(app: FastAPI, config: ServeConfig, tracker: RequestTracker) -> Gateway:
    limits = ServerLimits(
        max_num_queued_reqs=100, max_header_bytes=8192, max_body_bytes=1 << 20, max_prompt_characters=None,
        max_output_tokens=None, request_timeout_s=None,
    )  # fmt: skip
    names = (*config.served_model_name, *MODELS)
    keys = KeyStore(config.api_keys) if config.api_keys is not None else None
    return Gateway(
        app, limits, keys, tracker, Models(names[0], names.__contains__), is_draining=lambda: False
    )
