"""`lowbit serve` without a flag in Vertex AI's environment, on the real engine: predictions, streams, counts, end."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from scripts.demo import KV_CACHE_GIB, LOWBIT
from tests.e2e.conftest import Demo

from lowbit_core.server_process import ServerProcess, free_port, start_server

pytestmark = pytest.mark.engine

HEALTH, PREDICT = "/v1/endpoints/7/deployedModels/9", "/v1/endpoints/7/deployedModels/9:predict"
CITIES = ("Germany", "Italy", "Spain")


@pytest.fixture(scope="module")
def vertex(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    port, log = free_port(), tmp_path_factory.mktemp("vertex") / "serve.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOWBIT_")} | {
        "AIP_HTTP_PORT": str(port), "AIP_HEALTH_ROUTE": HEALTH, "AIP_PREDICT_ROUTE": PREDICT,
        "AIP_STORAGE_URI": str(demo.checkpoint), "LOWBIT_HOST": "127.0.0.1", "LOWBIT_ENFORCE_EAGER": "1",
        "LOWBIT_KV_CACHE_GIB": KV_CACHE_GIB,
    }  # fmt: skip
    server = start_server(
        [*LOWBIT, "serve"], f"http://127.0.0.1:{port}", log, name="lowbit serve", environment=environment
    )
    try:
        server.wait_until_ready(HEALTH)
        yield server
    finally:
        server.kill()


def question(country: str, **changes: Any) -> dict[str, Any]:
    text = f"What is the capital of {country}?"
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 16} | changes


def counted(url: str) -> float:
    """Tokens that the server has generated, as its metrics say."""
    samples = [
        one
        for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
        for one in family.samples
    ]
    return sum(
        one.value for one in samples
        if one.name == "lowbit_key_tokens_total" and one.labels["kind"] == "generated"
    )  # fmt: skip


def test_instances_are_answered_as_single_requests_are_and_counted_by_the_engine(
    vertex: ServerProcess,
) -> None:
    url = f"{vertex.url}{PREDICT}"
    single = [httpx.post(url, json=question(one), timeout=60).json() for one in CITIES]
    before = counted(vertex.url)
    answer = httpx.post(url, json={"instances": [question(one) for one in CITIES]}, timeout=60)
    assert answer.status_code == 200
    predictions = answer.json()["predictions"]
    assert [one["choices"][0]["message"]["content"] for one in predictions] == [
        one["choices"][0]["message"]["content"] for one in single
    ]
    generated = sum(one["usage"]["completion_tokens"] for one in predictions)
    assert counted(vertex.url) - before == generated
    assert "Berlin" in predictions[0]["choices"][0]["message"]["content"]


def test_a_plain_body_streams_and_a_wrong_instance_is_refused(vertex: ServerProcess) -> None:
    url = f"{vertex.url}{PREDICT}"
    streamed = httpx.post(url, json=question("Germany", stream=True), timeout=60)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.text.endswith("data: [DONE]\n\n")
    instances = [question("Germany"), question("Italy", temperature=-1)]
    refused = httpx.post(url, json={"instances": instances}, timeout=60)
    assert refused.status_code == 400
    assert "temperature" in refused.json()["error"]["message"]


def test_at_sigterm_it_ends_by_itself(vertex: ServerProcess) -> None:
    """The last test here: it ends the server."""
    vertex.process.send_signal(signal.SIGTERM)
    assert vertex.process.wait(60) == 0
