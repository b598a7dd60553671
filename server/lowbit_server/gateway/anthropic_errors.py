"""Errors as Anthropic's API has them, which its clients read by type.

`{"type": "error", "error": {"type": str, "message": str}, "request_id": str}`, and the same as a stream's last event
(platform.claude.com/docs/en/api/errors). There is neither a code nor a parameter: a parameter is named in the message.
What a key has left of its limits is said in Anthropic's headers too (platform.claude.com/docs/en/api/rate-limits).
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",  # it loads or drains: for now, as Anthropic's own 529
    504: "timeout_error",
}
LIMITS = "anthropic-ratelimit"
MISREAD = b"for ChatCompletionStreamResponse"  # in what vLLM says of a chat stream's error, which it takes for a chunk
FAILED = {"error": {"message": "the engine failed on this request"}}


def anthropic_document(status: int, message: str, param: str | None = None, request_id: str = "") -> bytes:
    """An error document for an HTTP status."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    named = message if param is None or param in message else f"{param}: {message}"
    document = {"type": "error", "error": {"type": kind, "message": named}}
    return json.dumps(document | ({"request_id": request_id} if request_id else {})).encode()


def anthropic_event(document: bytes) -> bytes:
    """An error document as an event of a stream."""
    return b"event: error\ndata: " + document + b"\n\n"


def engines_document(body: bytes) -> bytes:
    """The document of vLLM's error event; where vLLM has misread the engine's, one that says what happened."""
    return json.dumps(FAILED).encode() if MISREAD in body else body


def with_limits(headers: Mapping[str, str], now: datetime | None = None) -> dict[str, str]:
    """Headers with Anthropic's names beside OpenAI's `x-ratelimit-…`; a limit's reset is a time (RFC 3339)."""
    found = dict(headers)
    for unit in ("requests", "tokens"):
        if (reset := headers.get(f"x-ratelimit-reset-{unit}")) is None:
            continue
        full_at = (now or datetime.now(UTC)) + timedelta(seconds=float(reset.removesuffix("s")))
        found |= {
            f"{LIMITS}-{unit}-{what}": headers[f"x-ratelimit-{what}-{unit}"]
            for what in ("limit", "remaining")
        }
        found[f"{LIMITS}-{unit}-reset"] = full_at.isoformat(timespec="seconds").replace("+00:00", "Z")
    return found
