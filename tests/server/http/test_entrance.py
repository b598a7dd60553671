"""HTTP's general rules, whatever app is behind: HEAD, a proxy's prefix, compressed bodies."""

import gzip
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from backports import zstd
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from lowbit_server.flags import proxies, url_prefix
from lowbit_server.gateway.openai_errors import ApiError, send_error
from lowbit_server.gateway.request_body import read_body
from lowbit_server.http.content_encoding import DECOMPRESSORS
from lowbit_server.http.entrance import Entrance

MOST = 1 << 20
PLAIN = bytes(range(256)) * 100
CODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "zstd": zstd.compress,
}


class Reader:
    """Answers with the size of the body that it reads, or with the refusal."""

    def __init__(self) -> None:
        self.body = b""
        self.scope: Scope = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.datastructures import Headers

        self.scope = scope
        try:
            self.body = await read_body(receive, Headers(scope=scope), MOST)
        except ApiError as error:
            await send_error(send, error, {})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d" % len(self.body)})


@pytest.fixture
def reader() -> Reader:
    return Reader()


async def ask(
    app: Any, method: str = "POST", path: str = "/", root_path: str = "", **given: Any
) -> httpx.Response:
    transport = httpx.ASGITransport(Entrance(app, root_path, MOST))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.request(method, path, **given)


async def in_pieces(body: bytes, size: int) -> Any:
    for begin in range(0, len(body), size):
        yield body[begin : begin + size]


@pytest.mark.parametrize("encoding", [*CODERS, "GZIP", " zstd "])
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
async def test_a_compressed_body_arrives_plain(reader: Reader, encoding: str, size: int) -> None:
    compressed = CODERS[encoding.strip().lower()](PLAIN)
    answer = await ask(reader, content=in_pieces(compressed, size), headers={"content-encoding": encoding})
    assert answer.status_code == 200
    assert reader.body == PLAIN
    names = {name for name, _ in reader.scope["headers"]}
    assert not names & {b"content-encoding", b"content-length"}


def test_every_encoding_is_tried_here() -> None:
    assert set(DECOMPRESSORS) == set(CODERS)


@pytest.mark.parametrize("encoding", CODERS)
async def test_members_one_after_the_other_are_one_body(reader: Reader, encoding: str) -> None:
    code = CODERS[encoding]
    body = code(PLAIN) + code(b"") + code(b"the end")
    await ask(reader, content=body, headers={"content-encoding": encoding})
    assert reader.body == PLAIN + b"the end"


@pytest.mark.parametrize("encoding", CODERS)
async def test_a_body_is_bounded_after_inflating(reader: Reader, encoding: str) -> None:
    code = CODERS[encoding]
    whole = await ask(reader, content=code(bytes(MOST)), headers={"content-encoding": encoding})
    assert (whole.status_code, len(reader.body)) == (200, MOST)
    for bomb in (code(bytes(MOST + 1)), code(bytes(100 * MOST)), code(b"") * MOST):
        answer = await ask(reader, content=bomb, headers={"content-encoding": encoding})
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("encoding", CODERS)
async def test_a_broken_body_is_400(reader: Reader, encoding: str) -> None:
    whole = CODERS[encoding](PLAIN)
    for broken in (whole[:-1], whole[:10], b"{}", whole + b"x", b"\0" + whole[1:]):
        answer = await ask(reader, content=broken, headers={"content-encoding": encoding})
        assert answer.status_code == 400, broken[:20]
        assert encoding in answer.json()["error"]["message"]


async def test_a_window_above_8_mib_is_refused(reader: Reader) -> None:
    wide = zstd.compress(bytes(100), options={zstd.CompressionParameter.window_log: 27})
    stream = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    wide = stream.compress(bytes(100)) + stream.flush()
    answer = await ask(reader, content=wide, headers={"content-encoding": "zstd"})
    assert answer.status_code == 400


@pytest.mark.parametrize("encoding", ["br", "deflate", "gzip, zstd", "nonsense"])
async def test_another_encoding_is_415_and_says_which_there_are(reader: Reader, encoding: str) -> None:
    answer = await ask(reader, content=zlib.compress(PLAIN), headers={"content-encoding": encoding})
    assert answer.status_code == 415
    assert "gzip, zstd" in answer.json()["error"]["message"]


async def test_identity_and_an_empty_body_pass(reader: Reader) -> None:
    for encoding, body in (("identity", b"{}"), ("gzip", b""), ("zstd", b"")):
        await ask(reader, content=body, headers={"content-encoding": encoding})
        assert reader.body == body


def routes() -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {}

    @app.post("/v1/chat/completions")
    async def chat() -> None:
        return None

    return app


async def test_head_is_answered_where_get_is() -> None:
    get, head = [await ask(routes(), method, "/v1/models") for method in ("GET", "HEAD")]
    assert head.status_code == get.status_code == 200
    assert head.headers == get.headers
    assert (await ask(routes(), "HEAD", "/v1/chat/completions")).status_code == 405
    assert (await ask(routes(), "HEAD", "/nowhere")).status_code == 404


@pytest.mark.parametrize("path", ["/v1/models", "/llm/v1/models"])
async def test_a_proxys_prefix_may_be_stripped_or_not(path: str) -> None:
    assert (await ask(routes(), "GET", path, root_path="/llm")).status_code == 200


@pytest.mark.parametrize("path", ["/llmv1/models", "/llm", "/llm/llm/v1/models", "/other/v1/models"])
async def test_another_prefix_is_404(path: str) -> None:
    assert (await ask(routes(), "GET", path, root_path="/llm")).status_code == 404


@pytest.mark.parametrize("prefix", ["/llm", "/a/b-c.d~e_f", "/llm/", ""])
def test_a_prefix_is_checked_at_the_start(prefix: str) -> None:
    assert url_prefix(prefix) == prefix.rstrip("/")


@pytest.mark.parametrize("prefix", ["llm", "//", "/a//b", "/a b", "/a?b", "http://a/b", "/a%20b", "/ä"])
def test_what_is_no_prefix_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="a path such as /llm"):
        url_prefix(prefix)


def test_proxies_are_checked_at_the_start() -> None:
    assert proxies("10.0.0.0/8, ::1,unix") == ("10.0.0.0/8", "::1/128", "unix")
    for wrong in ("*", "proxy.example", "10.0.0.1/8", "10.0.0.300"):
        with pytest.raises(ValueError, match="IP addresses and networks by comma, or unix"):
            proxies(wrong)
