"""What the environments of three clouds say, and the processes themselves, started as each cloud starts its containers.

The processes run the mock engine: all that is ours, and no model. They listen on this machine only, by LOWBIT_HOST.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from benchmarks.mock_engine import MODEL, folder

from lowbit_core.errors import ConfigError
from lowbit_core.server_process import ServerProcess, free_port, running_server
from lowbit_server.cli import add_serve_arguments, config_from
from lowbit_server.clouds import Cloud, checkpoint_in, cloud_of
from lowbit_server.config import ServeConfig

ROOT = Path(__file__).parents[2]
MOCK = (sys.executable, str(ROOT / "benchmarks" / "mock_engine.py"), "serve")
QUESTION = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
HEALTH, PREDICT = "/v1/endpoints/7/deployedModels/9", "/v1/endpoints/7/deployedModels/9:predict"
NOWHERE = Path("/nowhere")


def config_of(environment: Mapping[str, str], *words: str) -> ServeConfig:
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser, environment)
    return config_from(parser.parse_args(words))


def test_no_cloud_is_no_cloud() -> None:
    assert cloud_of({"HOME": "/root", "AZUREML_MODEL_DIR": "", "AWS_REGION": "x"}, NOWHERE) is None
    assert config_of({}, "ckpt") == ServeConfig(Path("ckpt"))


def test_sagemaker_is_told_by_its_model_directory(tmp_path: Path) -> None:
    cloud = cloud_of({}, tmp_path)
    assert cloud == Cloud("SageMaker", str(tmp_path), str(tmp_path), "8080")
    pipeline = cloud_of({"SAGEMAKER_BIND_TO_PORT": "15000"}, tmp_path)
    assert pipeline is not None
    assert (pipeline.port, pipeline.model) == ("15000", str(tmp_path))


@pytest.mark.parametrize(
    ("environment", "port", "aliases"),
    [
        ({"AZUREML_MODEL_DIR": "/m"}, 5001, {("POST", "/score"): "/invocations"}),
        ({"AIP_STORAGE_URI": "gs://b/m"}, 8080, {}),
        (
            {"AIP_HTTP_PORT": "7080", "AIP_HEALTH_ROUTE": HEALTH, "AIP_PREDICT_ROUTE": PREDICT + "/"},
            7080,
            {("GET", HEALTH): "/ping", ("POST", PREDICT): "/invocations"},
        ),
        ({"SM_MODEL_DIR": "/m"}, 8080, {}),
    ],
)
def test_flags_win_over_our_variables_and_those_over_a_cloud(
    environment: dict[str, str], port: int, aliases: dict[tuple[str, str], str]
) -> None:
    config = config_of(environment, "ckpt")
    assert (config.host, config.port, dict(config.aliases)) == ("0.0.0.0", port, aliases)
    ours = environment | {"LOWBIT_PORT": "9000", "LOWBIT_HOST": "::1"}
    assert (config_of(ours, "ckpt").host, config_of(ours, "ckpt").port) == ("::1", 9000)
    flags = config_of(ours, "ckpt", "--port", "9001", "--host", "127.0.0.1")
    assert (flags.host, flags.port) == ("127.0.0.1", 9001)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"AIP_HTTP_PORT": "80x"}, "AIP_HTTP_PORT=80x: a port is a whole number from 1 to 65535"),
        (
            {"SAGEMAKER_BIND_TO_PORT": "0"},
            "SAGEMAKER_BIND_TO_PORT=0: a port is a whole number from 1 to 65535",
        ),
        ({"AIP_PREDICT_ROUTE": "predict"}, "AIP_PREDICT_ROUTE=predict: give a path that begins with a slash"),
        (
            {"AIP_HTTP_PORT": "1", "AZUREML_MODEL_DIR": "/m"},
            "the environment has AIP_HTTP_PORT (Vertex AI) and AZUREML_MODEL_DIR (Azure ML): "
            "unset the variables of one of them",
        ),
    ],
)
def test_an_environment_that_cannot_be_followed_is_refused_in_a_line(
    environment: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        cloud_of(environment, NOWHERE)
    assert str(refused.value) == said


def test_a_checkpoint_is_the_directory_or_the_one_folder_in_it(tmp_path: Path) -> None:
    cloud = Cloud("Azure ML", "AZUREML_MODEL_DIR", "", "5001")
    for root in (tmp_path / "empty", tmp_path):
        with pytest.raises(ConfigError, match=r"holds no checkpoint; Azure ML must put one there"):
            checkpoint_in(cloud, root)
    first = folder(tmp_path / "first")
    assert checkpoint_in(cloud, first) == checkpoint_in(cloud, tmp_path) == first
    folder(tmp_path / "second")
    with pytest.raises(ConfigError, match=r"holds 2 checkpoints \(first, second\)"):
        checkpoint_in(cloud, tmp_path)


@contextmanager
def started(log: Path, port: int, environment: dict[str, str], ready: str) -> Iterator[ServerProcess]:
    """`lowbit serve`, without a flag, in a cloud's environment and nothing else of ours."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("LOWBIT_")}
    environment = bare | {"LOWBIT_HOST": "127.0.0.1", "PYTHONPATH": os.pathsep.join(sys.path)} | environment
    url = f"http://127.0.0.1:{port}"
    with running_server(MOCK, url, log, environment=environment, ready_path=ready) as server:
        yield server


def words(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def test_sagemakers_contract(tmp_path: Path) -> None:
    """GET /ping: 200 and nothing. POST /invocations: an answer or a stream. SIGTERM: an end by itself."""
    folder(tmp_path / "model")
    port = free_port()
    environment = {"SM_MODEL_DIR": str(tmp_path / "model"), "SAGEMAKER_BIND_TO_PORT": str(port)}
    with started(tmp_path / "log", port, environment, "/ping") as server:
        ping = httpx.get(f"{server.url}/ping")
        assert (ping.status_code, ping.content) == (200, b"")
        answer = httpx.post(f"{server.url}/invocations", json=QUESTION)
        assert (answer.status_code, words(answer.json())) == (200, " a a a")
        streamed = httpx.post(f"{server.url}/invocations", json=QUESTION | {"stream": True})
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert streamed.text.endswith("data: [DONE]\n\n")
        routed = {"X-Amzn-SageMaker-Custom-Attributes": "tenant=a, route=/v1/chat/completions"}
        assert httpx.post(f"{server.url}/invocations", json=QUESTION, headers=routed).status_code == 200
        refused = httpx.post(f"{server.url}/invocations", json={"hello": 1})
        assert (refused.status_code, set(refused.json()["error"])) == (
            400,
            {"message", "type", "param", "code"},
        )
        assert 'outcome="ok"} 3.0' in httpx.get(f"{server.url}/metrics").text
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0


def test_vertexs_contract(tmp_path: Path) -> None:
    """The port and both paths are its own; instances are answered by as many predictions, in their order."""
    folder(tmp_path / "artifacts")
    port = free_port()
    environment = {
        "AIP_HTTP_PORT": str(port), "AIP_HEALTH_ROUTE": HEALTH, "AIP_PREDICT_ROUTE": PREDICT,
        "AIP_STORAGE_URI": str(tmp_path / "artifacts"), "AIP_MODE": "PREDICTION",
    }  # fmt: skip
    with started(tmp_path / "log", port, environment, HEALTH) as server:
        instances = [QUESTION | {"max_tokens": count} for count in (3, 1, 2)]
        answer = httpx.post(f"{server.url}{PREDICT}", json={"instances": instances})
        assert answer.status_code == 200
        assert [words(one) for one in answer.json()["predictions"]] == [" a a a", " a", " a a"]
        plain: dict[str, Any] = {"messages": QUESTION["messages"], "@requestFormat": "chatCompletions"}
        shared = {"instances": [plain, plain], "parameters": {"max_tokens": 4}}
        answer = httpx.post(f"{server.url}{PREDICT}", json=shared)
        assert [words(one) for one in answer.json()["predictions"]] == [" a a a a"] * 2
        raw = httpx.post(f"{server.url}{PREDICT}", json=QUESTION | {"stream": True})  # streamRawPredict
        assert raw.text.endswith("data: [DONE]\n\n")
        refused = httpx.post(f"{server.url}{PREDICT}", json={"instances": [QUESTION | {"seed": 1}, QUESTION]})
        assert (refused.status_code, refused.json()["error"]["message"]) == (400, "refused")
        page = httpx.get(f"{server.url}/metrics").text
        assert (
            'lowbit_key_tokens_total{key="anonymous",kind="generated"} 20.0' in page
        )  # 6, 8, 3, and 3 of the refused


def test_vertexs_port_takes_connections_before_the_model_is_there(tmp_path: Path) -> None:
    """Its liveness probe is a TCP connection, four times in 40 s: a download may take longer."""
    pytest.importorskip("google.cloud.storage")
    port = free_port()
    with socket.create_server(("127.0.0.1", 0)) as storage:  # accepts, and never answers
        storage.settimeout(60)
        environment = os.environ | {
            "AIP_HTTP_PORT": str(port), "AIP_STORAGE_URI": "gs://bucket/model", "LOWBIT_HOST": "127.0.0.1",
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{storage.getsockname()[1]}",
        }  # fmt: skip
        process = subprocess.Popen(MOCK, env=environment, stderr=subprocess.PIPE)
        try:
            asked, _ = storage.accept()
            with asked, socket.create_connection(("127.0.0.1", port), 5):
                process.send_signal(signal.SIGTERM)
                began = time.monotonic()
                assert process.wait(10) == 130
                assert time.monotonic() - began < 5
        finally:
            process.kill()


def test_azures_contract(tmp_path: Path) -> None:
    """The mounted model is a folder of AZUREML_MODEL_DIR; probes tell loading from ready; POST /score is answered."""
    folder(tmp_path / "models" / "demo-w4a16")
    port = free_port()
    environment = {"AZUREML_MODEL_DIR": str(tmp_path / "models"), "LOWBIT_PORT": str(port)}
    with started(tmp_path / "log", port, environment, "/readyz") as server:
        assert httpx.get(f"{server.url}/livez").status_code == 200
        for path in ("/score", "/v1/chat/completions"):
            assert words(httpx.post(f"{server.url}{path}", json=QUESTION).json()) == " a a a"
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == MODEL


def test_a_model_that_a_cloud_did_not_bring_is_said_in_a_line(tmp_path: Path) -> None:
    environment = os.environ | {
        "AZUREML_MODEL_DIR": str(tmp_path), "LOWBIT_PORT": str(free_port()), "LOWBIT_HOST": "127.0.0.1",
    }  # fmt: skip
    done = subprocess.run(MOCK, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"AZUREML_MODEL_DIR: {tmp_path} holds no checkpoint" in done.stderr.splitlines()[-1]
    assert json.dumps(done.stdout) == '""'
