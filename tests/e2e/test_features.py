"""What flags add to the endpoint, on the real engine: adapters, tool calls, an admin port, traces, kernels named."""

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from openai import NotFoundError, OpenAI, PermissionDeniedError
from safetensors.torch import save_file
from scripts.demo import KV_CACHE_GIB, LOWBIT, MODEL
from tests.browser import chromium, watching
from tests.e2e.conftest import Demo
from tests.e2e.streams import until

from lowbit_core.server_process import free_port, start_server
from lowbit_server.gateway.keys import digest, new_key

pytestmark = pytest.mark.engine

QUESTION: Any = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Where is Rome?"}],
    "temperature": 0,
}
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@dataclass
class Collector:
    """A stand-in for an OpenTelemetry collector: it keeps what it is sent."""

    bodies: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        bodies = self.bodies

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                bodies.append(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1/traces"


@dataclass
class Served:
    """A server with an admin port and two keys: one for everything, one for the adapter `poet` alone."""

    url: str
    admin_url: str
    key: str
    poets_key: str
    collector: Collector

    def ask(self, key: str = "", **changes: Any) -> str:
        client = OpenAI(base_url=f"{self.url}/v1", api_key=key or self.key, max_retries=0)
        answer = client.chat.completions.create(**QUESTION | {"max_tokens": 12} | changes)
        return str(answer.choices[0].message.content)


def write_adapter(path: Path, checkpoint: Path, seed: int) -> Path:
    """A LoRA adapter of random weights for every q projection, large enough to change any answer."""
    shape = json.loads((checkpoint / "config.json").read_text())
    size, layers, generator = (
        shape["hidden_size"],
        shape["num_hidden_layers"],
        torch.Generator().manual_seed(seed),
    )
    tensors = {}
    for layer in range(layers):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(8, size, generator=generator) * 0.1
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(size, 8, generator=generator) * 0.1
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def served(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder, collector, port, admin_port = (
        tmp_path_factory.mktemp("features"),
        Collector(),
        free_port(),
        free_port(),
    )
    poet = write_adapter(folder / "poet", demo.checkpoint, 1)
    write_adapter(folder / "adapters" / "painter", demo.checkpoint, 2)
    key, poets_key = new_key(), new_key()
    keys = [
        {"name": "all", "sha256": digest(key)},
        {"name": "poets", "sha256": digest(poets_key), "models": ["poet"]},
    ]
    (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": keys}))
    command = [
        *LOWBIT, "serve", str(demo.checkpoint), "--port", str(port), "--admin-port", str(admin_port),
        "--served-model-name", MODEL, "--enforce-eager", "--kv-cache-gib", KV_CACHE_GIB,
        "--api-keys", str(folder / "keys.yaml"), "--tool-call-parser", "hermes",
        "--lora-modules", f"poet={poet}", "--lora-dir", str(folder / "adapters"),
        "--otlp-traces-endpoint", collector.url,
    ]  # fmt: skip
    environment = os.environ | {
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    server = start_server(
        command,
        f"http://127.0.0.1:{port}",
        folder / "serve.log",
        name="lowbit serve",
        environment=environment,
    )
    try:
        server.wait_until_ready()
        yield Served(server.url, f"http://127.0.0.1:{admin_port}", key, poets_key, collector)
        assert server.stop() == 0
    finally:
        server.kill()
        collector.server.shutdown()


def test_adapters_answer_under_their_names(served: Served) -> None:
    answers = [served.ask(model=model) for model in (MODEL, "poet", "painter")]
    assert len(set(answers)) == 3
    assert [served.ask(model=model) for model in (MODEL, "poet", "painter")] == answers
    cards = httpx.get(f"{served.url}/v1/models", headers={"authorization": f"Bearer {served.key}"}).json()[
        "data"
    ]
    assert {card["id"]: card["parent"] for card in cards} == {MODEL: None, "poet": MODEL, "painter": MODEL}
    for name in ("none", "../poet", "painter/../painter"):
        with pytest.raises(NotFoundError):
            served.ask(model=name)


def test_a_key_may_be_for_one_adapter(served: Served) -> None:
    assert served.ask(served.poets_key, model="poet") == served.ask(model="poet")
    for model in (MODEL, "painter"):
        with pytest.raises(PermissionDeniedError):
            served.ask(served.poets_key, model=model)


def test_the_page_with_a_key_has_an_adapter_answer_beside_the_model(served: Served) -> None:
    with chromium() as browser, watching(browser, served.url) as tab:
        tab.give_key(served.key)
        tab.page.select_option("#beside", "poet")
        tab.settings(12)
        tab.ask(QUESTION["messages"][0]["content"])
        assert tab.page.locator(".answer .who").all_inner_texts() == [MODEL, "poet"]
        models, adapters = tab.page.locator(".answer .content").all_inner_texts()
        assert models.strip() == served.ask().strip()
        assert adapters.strip()
        assert adapters != models
        assert tab.page.locator(".failed:visible").count() == 0


def test_a_strict_tool_call_obeys_its_schema(served: Served) -> None:
    city = {"type": "string", "enum": ["Rome", "Oslo"]}
    parameters = {
        "type": "object", "properties": {"city": city}, "required": ["city"], "additionalProperties": False,
    }  # fmt: skip
    function = {"name": "look_up", "strict": True, "parameters": parameters}
    tools: Any = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    client = OpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0)
    answer = client.chat.completions.create(**QUESTION, **tools, max_tokens=64)
    (call,) = answer.choices[0].message.tool_calls
    assert call.type == "function"
    assert json.loads(call.function.arguments)["city"] in {"Rome", "Oslo"}


def test_operators_ask_on_their_own_port_and_nobody_else_does(served: Served) -> None:
    assert "lowbit_memory_bytes" in httpx.get(f"{served.admin_url}/metrics").text
    assert httpx.get(f"{served.admin_url}/readyz").status_code == 200
    assert httpx.post(f"{served.admin_url}/v1/chat/completions", json=QUESTION).status_code == 404
    headers = {"authorization": f"Bearer {served.key}"}
    assert httpx.get(f"{served.url}/metrics", headers=headers).status_code == 404


def test_the_running_kernels_are_named(served: Served) -> None:
    engine = httpx.get(f"{served.admin_url}/lowbit/checkpoint").json()["engine"]
    kernels = {kind["layer"]: kind["kernel"] for kind in engine["layers"]}
    assert "WNA16" in kernels["QKVParallelLinear"]
    assert kernels["Attention"].endswith("Impl")


def test_a_request_joins_its_callers_trace(served: Served) -> None:
    headers = {"authorization": f"Bearer {served.key}", "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    body = QUESTION | {"max_tokens": 2}
    assert (
        httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=headers, timeout=60).status_code
        == 200
    )
    until(lambda: any(bytes.fromhex(TRACE) in sent for sent in served.collector.bodies))
