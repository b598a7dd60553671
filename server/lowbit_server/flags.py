"""Command-line flags and environment variables from the fields of one dataclass.

A field `some_field` made by `flag` is the flag `--some-field` and the variable `LOWBIT_SOME_FIELD`; the flag wins over
the variable, and the variable over the field's default.
"""

import argparse
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lowbit_core.cli import file_path
from lowbit_core.errors import ConfigError

GIB = 1 << 30
UNIX = "unix"  # a proxy on this machine that comes by the Unix socket
TRUE, FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")

ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[a-z0-9._-]+|\[[0-9a-f:.]+\])(:(?P<port>[1-9][0-9]{0,4}))?"
)
DEFAULT_PORTS = (("http", "80"), ("https", "443"))  # browsers leave them out

Parse = Callable[[str], object]  # raises ValueError, whose text completes "it must be …"


@dataclass(frozen=True)
class Flag:
    """`--name VALUE`; without `parse` it is a switch."""

    name: str
    group: str
    help: str
    parse: Parse | None = None
    default: object = None

    @property
    def variable(self) -> str:
        return "LOWBIT_" + self.name.removeprefix("--").replace("-", "_").upper()


def flag(
    group: str, help: str, parse: Parse | None = None, default: object = None, **also: tuple[str, Parse]
) -> Any:
    """A dataclass field that is a flag; `also`: flags that set the same field in another unit."""
    return field(
        default=False if parse is None else default,
        metadata={"group": group, "help": help, "parse": parse, "also": also},
    )


def flags_of(config: type) -> list[Flag]:
    """Every flag that the fields of a dataclass declare."""
    found = []
    for one in fields(config):
        if data := one.metadata:
            name = "--" + one.name.replace("_", "-")
            for other, (help, parse) in data["also"].items():
                found.append(Flag("--" + other.replace("_", "-"), data["group"], help, parse))
            found.append(Flag(name, data["group"], data["help"], data["parse"], one.default))
    return found


def add_arguments(
    parser: argparse.ArgumentParser, config: type, environment: Mapping[str, str] = os.environ
) -> None:
    """Declare a dataclass's flags, by group; their defaults come from the environment, then from the fields."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for one in flags_of(config):
        group = groups.get(one.group) or groups.setdefault(one.group, parser.add_argument_group(one.group))
        if one.parse is None:
            group.add_argument(
                one.name, action="store_true", default=_switched_on(one, environment), help=one.help
            )
            continue
        given = environment.get(one.variable, one.default)
        if str(given).startswith("tcp://"):  # Kubernetes' own LOWBIT_PORT, for a Service named "lowbit"
            given = one.default
        shown = "" if one.default in (None, "", ()) else f" (default: {one.default})"
        group.add_argument(one.name, type=_named(one, one.parse), default=given, help=one.help + shown)


def _switched_on(one: Flag, environment: Mapping[str, str]) -> bool:
    text = environment.get(one.variable, "").lower()
    if text not in TRUE + FALSE:
        raise ConfigError(f"{one.variable}={text}: give 1 or 0")
    return text in TRUE


def _named(one: Flag, parse: Parse) -> Parse:
    """Turn a ValueError of `parse` into one line that names the flag."""

    def convert(text: str) -> object:
        try:
            return parse(text)
        except ValueError as error:
            raise ConfigError(f"{one.name} (or {one.variable}) is {text!r}; it must be {error}") from None

    return convert


def between(low: int, high: int) -> Parse:
    """A whole number in this range, both ends included."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(text)

    return parse


def one_of(*choices: object) -> Parse:
    """One of these, written as `str` writes it."""

    def parse(text: str) -> object:
        found = {str(choice): choice for choice in choices}
        if text not in found:
            raise ValueError(f"one of {', '.join(found)}")
        return found[text]

    return parse


def gib(text: str) -> int:
    """Bytes of a number of GiB."""
    number = _float(text)
    if not 0 < number <= 1 << 20:
        raise ValueError("a number of GiB above 0")
    return int(number * GIB)


def fraction(text: str) -> float:
    """A number above 0 and at most 1."""
    number = _float(text)
    if not 0 < number <= 1:
        raise ValueError("a number above 0 and at most 1")
    return number


def price(text: str) -> float:
    """A price above 0, in whatever currency."""
    number = _float(text)
    if not 0 < number < 1e9:
        raise ValueError("a price above 0, such as 2.40")
    return number


def server_url(text: str) -> str:
    """`http://host:port`, perhaps with a prefix; a slash or `/v1` at the end is dropped."""
    parts = urlsplit(text)
    try:
        sound = parts.port != 0 and parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:  # a port that is none
        sound = False
    if not sound or parts.query or parts.fragment or "@" in parts.netloc or not text.isprintable():
        raise ValueError("an address such as http://base:8000, without a user, query or fragment")
    return text.rstrip("/").removesuffix("/v1").rstrip("/")


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # fails the caller's range check, which has the right message


def named_paths(text: str) -> tuple[tuple[str, Path], ...]:
    """`NAME=DIR,NAME=DIR` as pairs."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    if not pairs or not all(name and path for name, _, path in pairs):
        raise ValueError("NAME=DIR, several by comma")
    return tuple((name, file_path(path)) for name, _, path in pairs)


def url_prefix(text: str) -> str:
    """`/one` or `/one/two`, or nothing; a slash at the end is dropped."""
    prefix = text.removesuffix("/")
    if prefix and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", prefix):
        raise ValueError("a path such as /llm, of letters, digits and . _ ~ -")
    return prefix


def proxies(text: str) -> tuple[str, ...]:
    """Addresses and networks of proxies, and `unix` for those that come by a Unix socket."""
    named = tuple(part.strip() for part in text.split(",") if part.strip())
    try:
        networks = [ip_network(one) for one in named if one != UNIX]
    except ValueError as error:
        raise ValueError(f"IP addresses and networks by comma, or unix ({error})") from None
    return tuple(str(network) for network in networks) + (UNIX,) * (UNIX in named)


def model_names(text: str) -> tuple[str, ...]:
    """One name or several, by comma; they may hold slashes, as names on a hub do."""
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    sound = all(name.isprintable() and name == name.strip("/") for name in names)
    if not names or not sound or len(set(names)) < len(names):
        raise ValueError("names by comma, each once, without a slash at their ends")
    return names


def origins(text: str) -> tuple[str, ...]:
    """Origins as browsers write them in the header `Origin`, or `*` for every one."""
    named = tuple(part.strip() for part in text.split(",") if part.strip())
    for one in named:
        match = ORIGIN.fullmatch(one)
        if one != "*" and (match is None or (match["scheme"], match["port"]) in DEFAULT_PORTS):
            raise ValueError(
                f"origins by comma, such as https://a.example or http://localhost:3000, or *; {one} is none: an origin "
                "is a scheme and a host in small letters, with a port only where it is not the scheme's own, no path"
            )
    return named
