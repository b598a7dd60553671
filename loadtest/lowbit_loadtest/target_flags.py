"""The flags that say which server is measured, through which API, and how it is reached."""

import argparse
import os
from urllib.parse import urlsplit

from lowbit_core.access import access_of, add_access_arguments, api_key
from lowbit_core.errors import ConfigError
from lowbit_core.log import get_logger
from lowbit_core.names import did_you_mean
from lowbit_loadtest.generate.endpoints import ENDPOINTS, endpoint_named, split_endpoint
from lowbit_loadtest.generate.http.proxy import find_proxy
from lowbit_loadtest.generate.http.target import Target, split_query, ssl_context
from lowbit_loadtest.scenario import Scenario

log = get_logger("loadtest")


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """`--target` and what belongs to it; `target_of` reads them."""
    parser.add_argument(
        "--target",
        metavar="URL",
        type=_url,
        help="root URL of the server, or the whole URL of an endpoint",
    )
    group = parser.add_argument_group("how the target is asked")
    paths = ", ".join(f"/v1/{one.path}" for one in ENDPOINTS)
    group.add_argument("--endpoint", metavar="PATH", type=_endpoint, help=f"of {paths} (the first)")
    group.add_argument(
        "--lenient", action="store_true", help="count answers that end without [DONE] as completed"
    )
    add_access_arguments(group)


def target_of(arguments: argparse.Namespace, key_variable: str) -> Target:
    """The target, without a model; ConfigError where a flag or the environment cannot be meant so."""
    key, access = api_key(key_variable, os.environ.get(key_variable)), access_of(arguments)
    url, query = split_query(arguments.target)
    (_, named), given = split_endpoint(url), arguments.endpoint
    if named is not None and given is not None and named.name != given:
        raise ConfigError(
            f"--target ends with {named.path}, and --endpoint is {given}; give the root URL, or leave out --endpoint"
        )
    if urlsplit(url).scheme == "https":
        ssl_context(access)  # refuse what cannot be read before anything is sent
    proxy, said = find_proxy(url)
    if said is not None:
        log.info(said)
    return Target(
        url,
        api_key=key,
        access=access.with_query(query),
        endpoint=named.name if named is not None else given or ENDPOINTS[0].name,
        lenient=arguments.lenient,
        proxy=proxy,
    )


def _endpoint(text: str) -> str:
    """A path below /v1/, or below nothing, or the last part of it."""
    path = text.strip("/").removeprefix("v1/")
    found = next((one.name for one in ENDPOINTS if path in (one.name, one.path)), None)
    if found is None:
        names = [one.path for one in ENDPOINTS]
        known = ", ".join(f"/v1/{name}" for name in names)
        raise ConfigError(
            f"--endpoint {text} is not known; {did_you_mean(path, names)}known are: {known}. "
            "Another path before them: give the whole URL as --target"
        )
    return found


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # `port` is no number, or a bracket is missing
        known = None
    if known and text.isprintable() and " " not in text:
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not a server's root URL such as http://127.0.0.1:8000")


def check_fits(scenario: Scenario, target: Target) -> None:
    """ConfigError where the scenario wants what the endpoint cannot give."""
    endpoint, where = endpoint_named(target.endpoint), f"/v1/{endpoint_named(target.endpoint).path}"
    if scenario.output is not None and scenario.output.exact and not endpoint.can_be_exact:
        raise ConfigError(
            f"output.exact: {where} cannot be asked for an exact length; set output.exact=false"
        )
    if endpoint.streams:
        return
    if scenario.quality is not None:
        raise ConfigError(f"quality asks for text, which {where} does not give; leave quality out")
    if limits := [name for name in ("ttft_s", "tpot_s") if name in scenario.slo.limits_s]:
        raise ConfigError(f"slo.{limits[0]}: {where} answers in one piece; limit slo.e2e_s")
