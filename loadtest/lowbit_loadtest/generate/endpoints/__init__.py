"""The APIs that a server is asked through: one file each, which builds a body and reads what one event says.

An endpoint knows its own JSON only, and nothing of HTTP, of clocks or of how a stream must end.
"""

import re
from collections.abc import Sequence
from typing import Any, Protocol

from lowbit_loadtest.generate.endpoints import chat, completions, embeddings, messages, responses
from lowbit_loadtest.generate.endpoints.piece import Piece
from lowbit_loadtest.generate.request import Request


class Endpoint(Protocol):
    """One API. `path` is below the base URL; `limit_keys` are those of the body that limit the output tokens.

    A whole answer has `finish_key` and `last_mark`. With `key_header` the API key has a header of its own.
    `has_template`: messages are prompts by way of the server's chat template.
    """

    name: str
    path: str
    limit_keys: Sequence[str]
    streams: bool
    has_template: bool
    takes_json: bool
    takes_tools: bool
    can_be_exact: bool
    last_mark: str
    finish_key: str
    key_header: str | None
    headers: dict[str, str]

    def body(self, request: Request, model: str) -> dict[str, Any]:
        """What is sent."""

    def read(self, event: dict[str, Any]) -> Piece:
        """What an event, or a whole answer, says. Any of ValueError, TypeError, AttributeError and KeyError: nothing
        of this API."""


BEFORE_ENDPOINT = re.compile(r"/(v\d[\w.]*|deployments/[^/]+)$")
ENDPOINTS: tuple[Endpoint, ...] = (chat, completions, embeddings, responses, messages)


def endpoint_named(name: str) -> Endpoint:
    """The endpoint of that name."""
    return next(one for one in ENDPOINTS if one.name == name)


def split_endpoint(url: str) -> tuple[str, Endpoint | None]:
    """A URL without the endpoint that it ends with, and that.

    One word is an endpoint only after a version or a deployment (`/v1/responses`): alone it may be anybody's prefix.
    """
    whole = url.rstrip("/")
    for one in sorted(ENDPOINTS, key=lambda one: -len(one.path)):  # chat/completions is not completions
        base = whole.removesuffix(f"/{one.path}")
        if base != whole and ("/" in one.path or BEFORE_ENDPOINT.search(base)):
            return base, one
    return whole, None
