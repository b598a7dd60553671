"""What the port answers while the engine loads, and that nobody can keep the app from taking over."""

import asyncio
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from lowbit_core.errors import ConfigError
from lowbit_server.app import with_cors
from lowbit_server.config import ServeConfig
from lowbit_server.http.entrance import Entrance
from lowbit_server.http.listeners import bind
from lowbit_server.http.loading import Loading
from lowbit_server.http.serving import serving

CONFIG = ServeConfig(Path("unused"), cors_origins=("https://a.example",), drain_timeout_s=1)


@pytest.fixture
def loading() -> Loading:
    return Loading()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with bind("127.0.0.1", 0) as bound:
        yield bound


@pytest.fixture
async def front(loading: Loading, listener: socket.socket) -> AsyncIterator[Entrance]:
    entrance = Entrance(loading, "", 1 << 20)
    async with serving(with_cors(entrance, CONFIG), listener, CONFIG):
        yield entrance


@pytest.fixture
async def client(front: Entrance, listener: socket.socket) -> AsyncIterator[httpx.AsyncClient]:
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with httpx.AsyncClient(base_url=url, timeout=5) as client:
        yield client


@pytest.mark.parametrize("suffix", ["", "/", "?verbose=1", "/?a=b"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_probes_are_answered_as_later(client: httpx.AsyncClient, method: str, suffix: str) -> None:
    for path, status in (("/livez", 200), ("/health", 503), ("/readyz", 503), ("/startupz", 503)):
        answer = await client.request(method, path + suffix)
        assert (answer.status_code, answer.headers["retry-after"]) == (status, "5")
        assert method == "HEAD" or answer.json()["status"] == "loading"


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_everything_else_is_503_in_the_errors_shape(client: httpx.AsyncClient, method: str) -> None:
    for path in ("/v1/models", "/v1/chat/completions", "/metrics", "/livezz", "/"):
        answer = await client.request(method, path, json={"model": "x"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert answer.json()["error"]["code"] == "unavailable"


async def test_a_probe_is_read_only(client: httpx.AsyncClient) -> None:
    answer = await client.put("/livez")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


async def test_a_page_may_ask_while_loading(client: httpx.AsyncClient) -> None:
    page = {"origin": "https://a.example"}
    preflight = page | {"access-control-request-method": "POST"}
    answers = [
        await client.options("/v1/chat/completions", headers=preflight),
        await client.post("/v1/chat/completions", headers=page),
    ]
    assert [answer.status_code for answer in answers] == [200, 503]
    assert {answer.headers["access-control-allow-origin"] for answer in answers} == {"https://a.example"}


async def test_the_stages_follow_each_other(client: httpx.AsyncClient, loading: Loading) -> None:
    before = (await client.get("/startupz")).json()
    loading.next_stage()
    after = (await client.get("/startupz")).json()
    assert [(one["stage"], one["number"], one["of"]) for one in (before, after)] == [
        ("starting the engine", 1, 3),
        ("reading back what it loaded", 2, 3),
    ]


async def test_a_large_body_gets_the_answer(client: httpx.AsyncClient) -> None:
    for body in (b"x" * 3_000_000, _pieces()):
        answer = await client.post("/v1/chat/completions", content=body)
        assert answer.status_code == 503


async def _pieces() -> AsyncIterator[bytes]:
    for _ in range(30):
        yield b"x" * 100_000


async def test_slow_and_idle_clients_delay_neither_others_nor_the_app(
    client: httpx.AsyncClient, front: Entrance
) -> None:
    port = int(client.base_url.port or 0)
    idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(200)]
    for number, (_, writer) in enumerate(idle):
        writer.write(
            (b"", b"G", b"GET /livez HTTP/1.1\r\nX: ", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n")[
                number % 4
            ]
        )
    tasks = {asyncio.create_task(_drip([writer for _, writer in idle]))}
    try:
        for _ in range(3):
            assert await asyncio.wait_for(_status(client, "/livez"), 1) == 200
        app = FastAPI()
        app.add_api_route("/v1/models", lambda: {"ready": True})
        front.open(app)
        assert await asyncio.wait_for(_status(client, "/v1/models"), 1) == 200
    finally:
        tasks.pop().cancel()
        for _, writer in idle:
            writer.close()


async def _status(client: httpx.AsyncClient, path: str) -> int:
    return (await client.get(path)).status_code


async def _drip(writers: list[asyncio.StreamWriter]) -> None:
    while True:
        for writer in writers:
            writer.write(b"x")
        await asyncio.sleep(0.05)


async def test_a_connection_kept_from_loading_reaches_the_app(
    client: httpx.AsyncClient, front: Entrance
) -> None:
    async def app(scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    before = await client.get("/readyz")
    front.open(app)
    after = await client.get("/readyz")
    assert [before.status_code, after.status_code] == [503, 200]


async def test_https_is_answered_while_loading(
    tmp_path: Path, loading: Loading, listener: socket.socket
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-subj",
        "/CN=localhost",
        "-keyout",
        str(key),
    ]
    subprocess.run([*command, "-out", str(certificate)], check=True, capture_output=True)
    config = ServeConfig(tmp_path, ssl_certfile=certificate, ssl_keyfile=key, drain_timeout_s=1)
    async with serving(Entrance(loading, "", 1 << 20), listener, config):
        context = ssl.create_default_context(cafile=str(certificate))
        url = f"https://localhost:{listener.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=url, verify=context, timeout=5) as client:
            assert (await client.get("/livez")).status_code == 200
            assert (await client.post("/v1/completions", content=b"x" * 3_000_000)).status_code == 503


async def test_a_certificate_that_does_not_fit_its_key_is_found_before_anything_is_loaded(
    tmp_path: Path, loading: Loading, listener: socket.socket
) -> None:
    (tmp_path / "bad.pem").write_text("no certificate")
    config = ServeConfig(tmp_path, ssl_certfile=tmp_path / "bad.pem", ssl_keyfile=tmp_path / "bad.pem")
    with pytest.raises(ConfigError):
        async with serving(loading, listener, config):
            pass
