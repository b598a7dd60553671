"""Unix sockets: made, removed, replaced when stale, refused when in use."""

import socket
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from lowbit_core.errors import ConfigError
from lowbit_server.config import ServeConfig
from lowbit_server.http.listeners import bind, bind_unix, listener_of
from lowbit_server.http.serving import serving


async def who(scope: Scope, _receive: Receive, send: Send) -> None:
    body = f"{scope['scheme']} {scope['client'] and scope['client'][0]}".encode()
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]}
    )
    await send({"type": "http.response.body", "body": body})


FORWARDED = {"x-forwarded-for": "203.0.113.7", "x-forwarded-proto": "https"}


@pytest.mark.parametrize(
    ("believed", "seen"),
    [((), "http None"), (("127.0.0.0/8",), "http None"), (("unix",), "https 203.0.113.7")],
)
async def test_requests_come_by_a_unix_socket(tmp_path: Path, believed: tuple[str, ...], seen: str) -> None:
    config = ServeConfig(tmp_path, uds=tmp_path / "s", forwarded_allow_ips=believed)
    with listener_of(config) as listener:
        async with serving(who, listener, config):
            transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "s"))
            async with httpx.AsyncClient(transport=transport, base_url="http://lowbit") as client:
                assert (await client.get("/", headers=FORWARDED)).text == seen
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("believed", "seen"),
    [
        ((), "http 127.0.0.1"),
        (("127.0.0.1/32",), "https 203.0.113.7"),
        (("127.0.0.0/8",), "https 203.0.113.7"),
        (("10.0.0.0/8", "unix"), "http 127.0.0.1"),
    ],
)
async def test_only_named_proxies_are_believed(tmp_path: Path, believed: tuple[str, ...], seen: str) -> None:
    config = ServeConfig(tmp_path, forwarded_allow_ips=believed)
    with bind("127.0.0.1", 0) as listener:
        async with serving(who, listener, config), httpx.AsyncClient() as client:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
            assert (await client.get(url, headers=FORWARDED)).text == seen


def test_what_a_killed_server_left_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "s"))
    with bind_unix(tmp_path / "s") as listener:
        listener.listen()
    assert not (tmp_path / "s").exists()


def test_a_socket_in_use_is_refused_and_stays(tmp_path: Path) -> None:
    with bind_unix(tmp_path / "s") as listener:
        listener.listen()
        with (
            pytest.raises(ConfigError, match="a server answers there; choose another --uds"),
            bind_unix(tmp_path / "s"),
        ):
            pass
        assert (tmp_path / "s").exists()


def test_another_kind_of_file_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("mine")
    with pytest.raises(ConfigError, match="is there and no socket"), bind_unix(tmp_path / "s"):
        pass
    assert (tmp_path / "s").read_text() == "mine"


@pytest.mark.parametrize("name", ["x" * 200, "no/such/directory"])
def test_a_path_that_cannot_be_is_one_line(tmp_path: Path, name: str) -> None:
    with (
        pytest.raises(ConfigError, match=r"cannot listen on unix:.*choose another --uds"),
        bind_unix(tmp_path / name),
    ):
        pass
