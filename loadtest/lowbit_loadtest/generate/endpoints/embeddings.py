"""`/v1/embeddings`: a text in, a vector out, in one piece and without output tokens."""

from collections.abc import Sequence
from typing import Any

from lowbit_loadtest.generate.endpoints.conversation import as_prompt
from lowbit_loadtest.generate.endpoints.piece import Piece, Usage, read_usage
from lowbit_loadtest.generate.request import Request

name = "embeddings"
path = "embeddings"
limit_keys: Sequence[str] = ()
streams = False
has_template = False
takes_json = False
takes_tools = False
can_be_exact = False
last_mark = "a vector"
finish_key = "a vector"
key_header: str | None = None
headers: dict[str, str] = {}


def body(request: Request, model: str) -> dict[str, Any]:
    return {"model": model, "input": as_prompt(request.messages), "encoding_format": "float"}


def read(event: dict[str, Any]) -> Piece:
    """A whole answer; one without a vector says nothing."""
    rows = event.get("data")
    found = bool(rows) and isinstance(rows, list) and all(bool(row["embedding"]) for row in rows)
    said = read_usage(event.get("usage")) or Usage()
    usage = Usage(said.prompt_tokens, 0, cached_tokens=said.cached_tokens)
    return Piece(other=" " if found else "", usage=usage, finish_reason="stop" if found else None, done=found)
