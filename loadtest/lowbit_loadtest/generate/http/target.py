"""Where requests go, and the client that reaches it: URL, headers, query, certificates, proxy.

A target is the server's root, with or without /v1, or the whole URL of an endpoint, as Azure gives it
(`…/openai/deployments/NAME/chat/completions`): then what stands before the endpoint is the base of every other path.
"""

import os
import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import httpx

from lowbit_core.access import AUTHORIZATION, DIRECT, Access
from lowbit_core.errors import ConfigError
from lowbit_loadtest.generate.endpoints import endpoint_named, split_endpoint
from lowbit_loadtest.generate.http.transport import StreamTransport


@dataclass(frozen=True)
class Target:
    """Where requests go. `endpoint` is the API that is measured; `proxy` is the proxy's URL, if there is one.

    `lenient` counts an answer as completed that ends without its last mark.
    """

    url: str
    model: str = ""
    api_key: str | None = None
    timeout_s: float = 300.0
    access: Access = DIRECT
    endpoint: str = "chat"
    lenient: bool = False
    proxy: str | None = None

    @property
    def base_url(self) -> str:
        """What the API's paths are below; it ends with a slash."""
        base, endpoint = split_endpoint(self.url)
        return f"{base}/" if endpoint or base.endswith("/v1") else f"{base}/v1/"

    @property
    def root_url(self) -> str:
        """What is beside the API: /metrics."""
        return self.base_url.removesuffix("/").removesuffix("/v1")

    @property
    def shown(self) -> str:
        """The URL without a user's name and password."""
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    def described(self) -> dict[str, Any]:
        """How it is asked, for the result; headers and queries may be secret, so only their names."""
        access = self.access
        return {
            "path": f"{urlsplit(self.base_url).path}{endpoint_named(self.endpoint).path}",
            "lenient": self.lenient,
            "headers": [name for name, _ in access.headers],
            "query": [name for name, _ in access.query],
            "body": [change.shown for change in access.body],
            "proxy": self.proxy is not None,
        }

    @property
    def key_header_name(self) -> str:
        """The header that carries the API key."""
        return self.access.key_header or endpoint_named(self.endpoint).key_header or AUTHORIZATION

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries. The user's headers replace ours."""
        ours = {"accept-encoding": "identity", "content-type": "application/json"}
        if self.api_key:
            name = self.key_header_name.lower()
            ours[name] = f"Bearer {self.api_key}" if name == AUTHORIZATION else self.api_key
        ours |= endpoint_named(self.endpoint).headers
        return ours | {name.lower(): value for name, value in self.access.headers}


def split_query(url: str) -> tuple[str, list[tuple[str, str]]]:
    """The URL without its query, and the query, which goes with every request."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(query="", fragment="")), parse_qsl(parts.query, keep_blank_values=True)


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
