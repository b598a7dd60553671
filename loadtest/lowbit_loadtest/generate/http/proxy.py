"""Which proxy stands between us and a server, by the environment: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY.

As in curl the names may be in small letters, and as in Go this machine itself is never reached through a proxy. What is
decided is said, since a proxy's time is measured with the server's.
"""

import ipaddress
import urllib.request
from urllib.parse import urlsplit

import httpx

from lowbit_core.errors import ConfigError


def find_proxy(url: str) -> tuple[str | None, str | None]:
    """The proxy's URL, and a line for people; None and None where the environment has none. ConfigError."""
    parts = urlsplit(url)
    host, proxies = parts.hostname or "", urllib.request.getproxies_environment()
    name = next((one for one in (parts.scheme, "all") if proxies.get(one)), None)
    if name is None:
        return None, None
    variable = f"{name.upper()}_PROXY"
    if _is_this_machine(host):
        return None, f"{variable} is not used: {host} is this machine"
    address = f"{host}:{parts.port}" if parts.port else host
    if urllib.request.proxy_bypass(address, proxies):
        return None, f"{variable} is not used: NO_PROXY has {host}"
    proxy = proxies[name] if "://" in proxies[name] else f"http://{proxies[name]}"
    shown = _checked(proxy, variable)
    return proxy, f"through the proxy {shown} ({variable}): its time is measured with the server's"


def shown_proxy(proxy: str) -> str:
    """The proxy without a user's name and password."""
    url = httpx.URL(proxy)
    return str(url.copy_with(username=None, password=None)) if url.userinfo else proxy


def _checked(proxy: str, variable: str) -> str:
    try:
        httpx.AsyncHTTPTransport(proxy=proxy, trust_env=False, verify=False)
        return shown_proxy(proxy)
    except ImportError:
        raise ConfigError(
            f"{variable} is a SOCKS proxy, which needs socksio; run: pip install socksio"
        ) from None
    except (ValueError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"{variable} is no proxy's URL ({error}); give http://HOST:PORT, or unset it"
        ) from None


def _is_this_machine(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
