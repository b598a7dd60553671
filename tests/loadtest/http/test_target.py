"""How a target is reached: which paths are asked, what goes with a request, whom it trusts, and through whom."""

import asyncio
import json
import ssl
import subprocess
from pathlib import Path

import pytest
from tests.loadtest.dialects.odd_server import OddServer, asked
from tests.loadtest.dialects.wire import NORMAL, plain, whole

from lowbit_core.access import Access, body_change
from lowbit_core.errors import ConfigError
from lowbit_loadtest.generate import preflight
from lowbit_loadtest.generate.client import Client
from lowbit_loadtest.generate.http.proxy import find_proxy
from lowbit_loadtest.generate.http.target import Target, open_beside, open_http, split_query, ssl_context
from lowbit_loadtest.generate.records import Outcome, RequestRecord
from lowbit_loadtest.generate.request import Request

HELLO = Request(({"role": "user", "content": "Hello"},), max_tokens=9, temperature=0.0, seed=0)
MODELS = whole({"data": [{"id": "m"}]})


@pytest.mark.parametrize(
    ("url", "base", "root"),
    [
        ("http://h", "http://h/v1/", "http://h"),
        ("http://h/", "http://h/v1/", "http://h"),
        ("http://h:8/v1", "http://h:8/v1/", "http://h:8"),
        ("http://h/v1/", "http://h/v1/", "http://h"),
        ("http://h/a/b", "http://h/a/b/v1/", "http://h/a/b"),
        ("http://h/completions", "http://h/completions/v1/", "http://h/completions"),
        ("http://h/chat/completions", "http://h/", "http://h"),
        ("http://h/v1/chat/completions", "http://h/v1/", "http://h"),
        ("http://h/v1/completions/", "http://h/v1/", "http://h"),
        ("http://h/api/paas/v4/chat/completions", "http://h/api/paas/v4/", "http://h/api/paas/v4"),
        ("https://x/openai/deployments/N/embeddings", "https://x/openai/deployments/N/", "https://x/openai/deployments/N"),
        ("https://x/openai/v1/", "https://x/openai/v1/", "https://x/openai"),
    ],
)  # fmt: skip
def test_a_target_is_a_root_or_a_whole_url(url: str, base: str, root: str) -> None:
    assert (Target(url).base_url, Target(url).root_url) == (base, root)


def test_a_name_and_password_reach_the_server_and_are_not_shown() -> None:
    target = Target("http://me:secret@h:8/v1")
    assert target.shown == "http://h:8/v1"
    with open_beside(target) as http:
        assert http.build_request("GET", "/metrics").url.userinfo == b"me:secret"


def sent(target: Target, answers: dict[str, bytes], **changes: object) -> tuple[OddServer, RequestRecord]:
    """Ask once; what came to the server, and the record."""
    server = OddServer(answers)

    async def ask() -> RequestRecord:
        there = Target(**{**vars(target), "url": server.url + target.url, **changes})
        async with open_http(there) as http:
            await preflight.served_models(http, there)
            return await Client(http, there).complete(HELLO)

    return server, asked(server, ask)


def test_azures_form_is_asked_as_azure_wants_it() -> None:
    path, query = split_query("/openai/deployments/gpt/chat/completions?api-version=2024-10-21")
    body = tuple(map(body_change, ["max_completion_tokens=@max_tokens", "temperature=", "seed="]))
    access = Access(body=body, key_header="api-key").with_query(query)
    server, record = sent(Target(path, "gpt", "k", access=access), {path: plain(NORMAL)})
    assert record.outcome is Outcome.COMPLETED
    assert server.targets == [
        "/openai/deployments/gpt/models?api-version=2024-10-21",
        "/openai/deployments/gpt/chat/completions?api-version=2024-10-21",
    ]
    assert all(one["api-key"] == "k" and "authorization" not in one for one in server.headers)
    ((_, sent_body),) = server.bodies
    assert (sent_body["max_completion_tokens"], record.max_tokens) == (9, 9)
    assert not {"max_tokens", "temperature", "seed"} & sent_body.keys()


def test_headers_and_queries_go_with_every_request_and_replace_ours() -> None:
    access = Access(
        (("X-Org", "a b"), ("Authorization", "Basic x"), ("Host", "inside")), (("a", "1&2"), ("a", "ü"))
    )
    server, _ = sent(Target("/p", "m", "k", access=access), {"/p/v1/models": MODELS, "/p": plain(NORMAL)})
    assert server.targets == ["/p/v1/models?a=1%262&a=%C3%BC", "/p/v1/chat/completions?a=1%262&a=%C3%BC"]
    for headers in server.headers:
        assert (headers["x-org"], headers["authorization"], headers["host"]) == ("a b", "Basic x", "inside")


@pytest.mark.parametrize(
    ("endpoint", "access", "header"),
    [
        ("chat", Access(), ("authorization", "Bearer k")),
        ("messages", Access(), ("x-api-key", "k")),
        ("messages", Access(key_header="Authorization"), ("authorization", "Bearer k")),
        ("responses", Access(key_header="X-Key"), ("x-key", "k")),
    ],
)
def test_the_key_is_sent_as_the_api_has_it(endpoint: str, access: Access, header: tuple[str, str]) -> None:
    target = Target("http://h", "m", "k", access=access, endpoint=endpoint)
    assert [one for one in target.headers.items() if "k" in one[1].split()] == [header]
    assert ("anthropic-version" in target.headers) == (endpoint == "messages")


def test_what_is_said_of_a_target_has_no_secret_values() -> None:
    access = Access(
        (("X-Key", "secret"),),
        (("sig", "secret"),),
        (body_change("a.b=1"), body_change("c=")),
        key_header="k",
    )
    described = Target("http://u:secret@h", "m", "secret", access=access).described()
    assert "secret" not in json.dumps(described)
    assert (described["path"], described["body"]) == ("/v1/chat/completions", ["a.b=1", "c="])


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificate")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=h", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key.pem",
         "-out", folder / "c.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder / "c.pem"


def find_over_tls(certificate: Path, access: Access) -> str:
    """The model, from a server with that certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))
    server = OddServer({"/v1/models": MODELS})

    async def find() -> str:
        listener = await asyncio.start_server(server.handle, "127.0.0.1", 0, ssl=context)
        target = Target(f"https://127.0.0.1:{listener.sockets[0].getsockname()[1]}", access=access)
        async with listener, open_http(target) as http:
            return await preflight.find_model(http, target)

    return asyncio.run(find())


def test_a_certificate_is_trusted_when_it_is_given_or_not_checked(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ConfigError, match=r"certificate that is not trusted .*--ca-file CA.pem or SSL_CERT_FILE"
    ):
        find_over_tls(certificate, Access())
    assert find_over_tls(certificate, Access(ca_file=certificate)) == "m"
    assert find_over_tls(certificate, Access(insecure=True)) == "m"
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert find_over_tls(certificate, Access()) == "m"
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_name("nowhere")))
    with pytest.raises(ConfigError, match=r"SSL_CERT_FILE .* cannot be read"):
        ssl_context(Access())


@pytest.mark.parametrize(
    ("url", "environment", "proxy", "said"),
    [
        ("http://h:8000", {}, None, None),
        ("http://h:8000", {"HTTPS_PROXY": "http://p:3128"}, None, None),
        (
            "http://h:8000",
            {"HTTP_PROXY": "http://p:3128"},
            "http://p:3128",
            "through the proxy http://p:3128",
        ),
        ("https://h", {"https_proxy": "p:3128"}, "http://p:3128", "HTTPS_PROXY"),
        ("https://h", {"ALL_PROXY": "http://me:secret@p:1"}, "http://me:secret@p:1", "the proxy http://p:1 "),
        ("http://127.0.0.1:8", {"HTTP_PROXY": "http://p:3128"}, None, "127.0.0.1 is this machine"),
        ("http://[::1]:8", {"HTTP_PROXY": "http://p:3128"}, None, "::1 is this machine"),
        ("http://localhost", {"HTTP_PROXY": "http://p:3128"}, None, "localhost is this machine"),
        (
            "http://h.corp",
            {"HTTP_PROXY": "http://p:3128", "NO_PROXY": "a,.corp"},
            None,
            "NO_PROXY has h.corp",
        ),
        ("http://h.corp", {"HTTP_PROXY": "http://p:3128", "no_proxy": "*"}, None, "NO_PROXY has h.corp"),
        (
            "http://h.corp:8",
            {"HTTP_PROXY": "http://p:3128", "NO_PROXY": "h.corp:9"},
            "http://p:3128",
            "through",
        ),
        ("http://h", {"HTTP_PROXY": ""}, None, None),
    ],
)
def test_a_proxy_of_the_environment_is_used_or_it_is_said_that_it_is_not(
    url: str,
    environment: dict[str, str],
    proxy: str | None,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found, line = find_proxy(url)
    assert found == proxy
    assert (said in (line or "")) if said else line is None
    assert "secret" not in (line or "")


@pytest.mark.parametrize(
    ("proxy", "words"), [("ftp://p", "no proxy's URL"), ("http://p:port", "no proxy's URL")]
)
def test_a_proxy_that_cannot_be_used_is_refused(
    proxy: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(ConfigError, match=words):
        find_proxy("http://h")


def test_requests_go_through_the_proxy_and_are_read_alike() -> None:
    server = OddServer({"http://h.invalid/v1/models": MODELS, "http://h.invalid/v1/chat": plain(NORMAL)})

    async def ask() -> tuple[str, RequestRecord]:
        target = Target("http://h.invalid", "m", "k", proxy=server.url)
        async with open_http(target) as http:
            return await preflight.find_model(http, target), await Client(http, target).complete(HELLO)

    model, record = asked(server, ask)
    assert (model, record.outcome, record.output_tokens) == ("m", Outcome.COMPLETED, 5)
    assert server.targets == ["http://h.invalid/v1/models", "http://h.invalid/v1/chat/completions"]


def test_a_proxy_that_is_not_there_is_named() -> None:
    target = Target("http://h.invalid", proxy="http://127.0.0.1:9")

    async def find() -> str:
        async with open_http(target) as http:
            return await preflight.find_model(http, target)

    with pytest.raises(ConfigError, match=r"does not answer through the proxy http://127.0.0.1:9"):
        asyncio.run(find())


def test_a_line_break_never_reaches_the_wire() -> None:
    target = Target("http://127.0.0.1:9", "m", access=Access((("X-A", "a\r\nX-Evil: 1"),)))

    async def ask() -> RequestRecord:
        async with open_http(target) as http:
            return await Client(http, target).complete(HELLO)

    record = asyncio.run(ask())
    assert (record.outcome, record.detail) == (
        Outcome.FAILED,
        "LocalProtocolError: a line break in a header or a URL",
    )
