"""How a server is reached beside its URL: headers, query, changes of the body, certificates. Flags and what they mean.

`lowbit loadtest` and `lowbit evaluate --target` take the same flags. What cannot be sent is refused here, before the
first request: a header holds printable ASCII only, and a line break in it would be a header of its own.
"""

import argparse
import json
import ssl
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from lowbit_core.cli import file_path
from lowbit_core.errors import ConfigError

TOKEN = frozenset(string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~")  # RFC 9110, 5.6.2
FRAMING = ("connection", "content-length", "transfer-encoding", "upgrade")
AUTHORIZATION = "authorization"
FLAGS = ("header", "query", "body", "ca_file", "insecure", "key_header")


@dataclass(frozen=True)
class BodyChange:
    """One `--body`: the key, dots taken apart, gets `value`, or the value of the key `taken_from`, or is removed."""

    key: tuple[str, ...]
    value: Any = None
    taken_from: tuple[str, ...] | None = None
    removes: bool = False

    @property
    def shown(self) -> str:
        """As it is given."""
        key = ".".join(self.key)
        if self.removes:
            return f"{key}="
        return f"{key}=" + (f"@{'.'.join(self.taken_from)}" if self.taken_from else json.dumps(self.value))

    def apply(self, body: dict[str, Any]) -> None:
        """Change `body`, whose nested objects must not be shared."""
        if self.removes:
            _take(body, self.key)
        elif self.taken_from is None:
            _put(body, self.key, self.value)
        elif (found := _take(body, self.taken_from)) is not _NOTHING:
            _put(body, self.key, found)


@dataclass(frozen=True)
class Access:
    """What goes with every request. `key_header` carries the API key in place of `Authorization: Bearer`."""

    headers: tuple[tuple[str, str], ...] = ()
    query: tuple[tuple[str, str], ...] = ()
    body: tuple[BodyChange, ...] = ()
    ca_file: Path | None = None
    insecure: bool = False
    key_header: str | None = None

    def with_query(self, query: Iterable[tuple[str, str]]) -> "Access":
        """The same, with the URL's own query before that of `--query`."""
        return replace(self, query=(*query, *self.query))

    def changed(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body with every `--body`, in their order; `body` itself is left as it was."""
        if not self.body:
            return body
        copy: dict[str, Any] = json.loads(json.dumps(body))
        for change in self.body:
            change.apply(copy)
        return copy


DIRECT = Access()


def add_access_arguments(parser: argparse._ActionsContainer) -> None:
    """The flags; `access_of` reads them."""
    parser.add_argument(
        "--header", action="append", default=[], metavar="NAME=VALUE", help="send it with every request"
    )
    parser.add_argument(
        "--query", action="append", default=[], metavar="KEY=VALUE", help="add it to every URL"
    )
    parser.add_argument(
        "--body",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set a key of every body (JSON, or a word; a.b is inside a); KEY= removes it; KEY=@OTHER renames OTHER",
    )
    parser.add_argument(
        "--key-header",
        metavar="NAME",
        help="the header of the API key, such as api-key (Authorization: Bearer)",
    )
    parser.add_argument(
        "--ca-file",
        metavar="FILE.pem",
        type=file_path,
        help="trust these certificates too (or SSL_CERT_FILE)",
    )
    parser.add_argument("--insecure", action="store_true", help="do not check the server's certificate")


def access_of(arguments: argparse.Namespace) -> Access:
    """What the flags say; ConfigError where that cannot be sent."""
    if arguments.ca_file is not None:
        _check_certificates(arguments.ca_file)
        if arguments.insecure:
            raise ConfigError("--insecure checks no certificate, so --ca-file has no use; give one of them")
    return Access(
        _headers(arguments.header),
        tuple(_pair("--query", text) for text in arguments.query),
        tuple(body_change(text) for text in arguments.body),
        arguments.ca_file,
        arguments.insecure,
        _header_name("--key-header", arguments.key_header) if arguments.key_header else None,
    )


def given_flag(arguments: argparse.Namespace) -> str | None:
    """The first of these flags that was given."""
    given = next((name for name in FLAGS if getattr(arguments, name)), None)
    return f"--{given.replace('_', '-')}" if given else None


def check_header_value(what: str, value: str) -> str:
    """The value; ConfigError where a header cannot hold it. It may be a secret, so it is not shown."""
    if value.endswith("\n"):
        raise ConfigError(
            f"{what} ends with a line break, which a header cannot hold; make it without, as by printf"
        )
    if value != value.strip():
        raise ConfigError(f"{what} begins or ends with a space, which a header does not keep; leave it out")
    for place, character in enumerate(value, 1):
        if character != "\t" and not " " <= character <= "~":
            kind = (
                "line break"
                if character in "\r\n"
                else "letter that is not ASCII"
                if character > "~"
                else "control"
            )
            raise ConfigError(
                f"{what} has a {kind} (character {place}), which a header cannot hold; give another"
            )
    return value


def api_key(variable: str, value: str | None) -> str | None:
    """The API key of an environment variable; None where there is none. ConfigError where it cannot be sent."""
    return check_header_value(f"the key in {variable}", value) if value else None


def body_change(text: str) -> BodyChange:
    """One `--body`."""
    name, value = _pair("--body", text)
    key = _path(name, text)
    if not value:
        return BodyChange(key, removes=True)
    if value.startswith("@"):
        return BodyChange(key, taken_from=_path(value[1:], text))
    return BodyChange(key, _json_or_word(value, text))


def _json_or_word(value: str, text: str) -> Any:
    try:
        return json.loads(value, parse_constant=_no_number)
    except ValueError as error:
        if value[0] in '{["':
            raise ConfigError(
                f"--body {text!r}: the value is not JSON ({error}); quote it for the shell"
            ) from None
        return value


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


def _path(name: str, text: str) -> tuple[str, ...]:
    key = tuple(name.split("."))
    if not all(key):
        raise ConfigError(f"--body {text!r}: {name!r} is no key; give KEY=VALUE, or OUTER.INNER=VALUE")
    return key


def _headers(given: Sequence[str]) -> tuple[tuple[str, str], ...]:
    headers: dict[str, str] = {}
    for text in given:
        end = next((place for place, character in enumerate(text) if character in "=:"), -1)
        if end < 1:
            raise ConfigError("--header needs a name and a value: --header NAME=VALUE, or 'NAME: VALUE'")
        name = _header_name("--header", text[:end])
        if name.lower() in (one.lower() for one in headers):
            raise ConfigError(f"--header {name} is given twice; join the values with a comma")
        value = text[end + 1 :]
        headers[name] = check_header_value(
            f"--header {name}", value.removeprefix(" ") if text[end] == ":" else value
        )
    return tuple(headers.items())


def _header_name(flag: str, name: str) -> str:
    if not name or not set(name) <= TOKEN:
        raise ConfigError(f"{flag} {name!r} is no header's name; a name has letters, digits and hyphens")
    if name.lower() in FRAMING:
        raise ConfigError(f"{flag} {name} belongs to the connection and cannot be set; leave it out")
    return name


def _pair(flag: str, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ConfigError(f"{flag} {text!r} is not KEY=VALUE")
    return key, value


def _check_certificates(path: Path) -> None:
    try:
        ssl.create_default_context().load_verify_locations(cafile=path)
    except (OSError, ssl.SSLError) as error:
        reason = (
            error.strerror
            if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)
            else error
        )
        raise ConfigError(
            f"--ca-file {path} cannot be read ({reason}); give a file of PEM certificates"
        ) from None


_NOTHING = object()


def _put(body: dict[str, Any], key: tuple[str, ...], value: Any) -> None:
    *outer, last = key
    for name in outer:
        inside = body.get(name)
        if not isinstance(inside, dict):
            inside = body[name] = {}
        body = inside
    body[last] = value


def _take(body: dict[str, Any], key: tuple[str, ...]) -> Any:
    """Remove the key and give its value. An object that it leaves empty stays."""
    *outer, last = key
    for name in outer:
        inside = body.get(name)
        if not isinstance(inside, dict):
            return _NOTHING
        body = inside
    return body.pop(last, _NOTHING)
