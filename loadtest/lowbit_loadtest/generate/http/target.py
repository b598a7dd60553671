"""Where requests go, and the client that reaches it: URL, headers, query, certificates, proxy.

A target is the server's root, with or without /v1, or the whole URL of one of the API's doors, as Azure gives it
(`…/openai/deployments/NAME/chat/completions`): then what stands before the door is the base of every other path.
"""

import os
import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

import httpx

from lowbit_core.access import DIRECT, Access
from lowbit_core.errors import ConfigError
from lowbit_loadtest.generate.http.transport import StreamTransport

PATHS = {  # of the API's doors, below the base
    "chat": "chat/completions",
    "completions": "completions",
    "embeddings": "embeddings",
    "responses": "responses",
    "messages": "messages",
}


@dataclass(frozen=True)
class Target:
    """Where requests go. `door` is the API that is measured; `proxy` is the proxy's URL, if there is one.

    `lenient` counts an answer as completed that ends without its last mark.
    """

    url: str
    model: str = ""
    api_key: str | None = None
    timeout_s: float = 300.0
    access: Access = DIRECT
    door: str = "chat"
    lenient: bool = False
    proxy: str | None = None

    @property
    def base_url(self) -> str:
        """What the API's paths are below; it ends with a slash."""
        base, door = _split(self.url)
        return f"{base}/" if door is not None or base.endswith("/v1") else f"{base}/v1/"

    @property
    def root_url(self) -> str:
        """What is beside the API: /metrics."""
        return self.base_url.removesuffix("/").removesuffix("/v1")

    @property
    def shown(self) -> str:
        """The URL without a user's name and password."""
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries. The user's headers replace ours."""
        headers = {"accept-encoding": "identity"}
        if self.api_key:
            name = self.access.key_header or ("x-api-key" if self.door == "messages" else None)
            headers |= {name: self.api_key} if name else {"authorization": f"Bearer {self.api_key}"}
        if self.door == "messages":
            headers["anthropic-version"] = "2023-06-01"
        return {name.lower(): value for name, value in (*headers.items(), *self.access.headers)}


def door_of(url: str) -> str | None:
    """The door that the URL ends with; None for a server's root."""
    return _split(url)[1]


def _split(url: str) -> tuple[str, str | None]:
    whole = url.rstrip("/")
    for door, path in sorted(PATHS.items(), key=lambda one: -len(one[1])):
        if whole.endswith(f"/{path}"):
            return whole.removesuffix(f"/{path}").rstrip("/"), door
    return whole, None


def ssl_context(access: Access) -> ssl.SSLContext:
    """Certificates that are trusted: certifi's, or those of SSL_CERT_FILE and SSL_CERT_DIR, and `--ca-file`."""
    try:
        context = httpx.create_ssl_context(verify=not access.insecure)
    except OSError as error:
        name = os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR")
        raise ConfigError(
            f"SSL_CERT_FILE or SSL_CERT_DIR {name} cannot be read ({error}); unset it"
        ) from None
    if access.ca_file is not None:
        context.load_verify_locations(cafile=access.ca_file)
    return context


def open_http(target: Target, transport: httpx.AsyncBaseTransport | None = None) -> httpx.AsyncClient:
    """A client whose base URL ends with a slash, /v1/ for most servers.

    It has any number of connections, because a bound would be a queue inside the generator.
    """
    return httpx.AsyncClient(
        base_url=target.base_url,
        headers=target.headers,
        params=target.access.query,
        timeout=None,  # each request has one deadline, which the client holds
        transport=transport or _transport(target),
    )


def open_beside(target: Target) -> httpx.Client:
    """A client without asyncio for what is beside the API, such as /metrics."""
    return httpx.Client(
        base_url=target.root_url,
        headers=target.headers,
        params=target.access.query,
        timeout=5.0,
        trust_env=False,
        proxy=target.proxy,
        verify=ssl_context(target.access),
    )


def _transport(target: Target) -> httpx.AsyncBaseTransport:
    if target.proxy is None:
        return StreamTransport(lambda: ssl_context(target.access))
    unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncHTTPTransport(
        verify=ssl_context(target.access), proxy=target.proxy, limits=unlimited, trust_env=False
    )
