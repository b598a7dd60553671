"""Errors in the one shape that a route's clients understand, whether the gateway, FastAPI or vLLM raised them.

OpenAI's is `{"error": {"message": str, "type": str, "param": str | null, "code": str | null}}`; Anthropic's is in
`anthropic_errors.py`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Send

from lowbit_server.gateway.anthropic_errors import (
    anthropic_document,
    anthropic_event,
    engines_document,
    with_limits,
)
from lowbit_server.gateway.route_table import ErrorShape
from lowbit_server.gateway.validation_errors import readable

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
TYPES_BY_CODE = {"insufficient_quota": "insufficient_quota"}  # as OpenAI has it
CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "permission_denied",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    431: "request_header_too_large",
    500: "internal_error",
    501: "not_implemented",
    503: "unavailable",
    504: "deadline_exceeded",
}
# What vLLM says of a prompt that is too long: parameters that no API has, and words of its messages.
PROMPT_PARAMETERS = ("input_tokens", "input_text")
PROMPT_TOO_LONG = ("is longer than the maximum model length", "plus the number of requested output tokens")
NOT_KEPT = "Response with id "


@dataclass(frozen=True)
class ApiError(Exception):
    """An error response. `reason` names it in metrics and logs."""

    status: int
    message: str
    reason: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self, shape: ErrorShape = "openai", request_id: str = "") -> bytes:
        """The JSON document."""
        return error_document(self.status, self.message, self.code, self.param, shape, request_id)


def too_large(asked: str, limit: str, reason: str) -> ApiError:
    """A request that can never be admitted; `x-should-retry` tells OpenAI's clients so."""
    message = (
        f"this request is too large: it asks for {asked}, the limit is {limit}; send less in one request"
    )
    return ApiError(429, message, reason, headers={"x-should-retry": "false"})


def error_document(
    status: int,
    message: str,
    code: str | None = None,
    param: str | None = None,
    shape: ErrorShape = "openai",
    request_id: str = "",
) -> bytes:
    """An error document for an HTTP status."""
    if shape == "anthropic":
        return anthropic_document(status, message, param, request_id)
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    kind = TYPES_BY_CODE.get(code or "", kind)
    error = {"message": message, "type": kind, "param": param, "code": code or CODES.get(status)}
    return json.dumps({"error": error}).encode()


def normalized(
    status: int, body: bytes, prompt: str | None = None, shape: ErrorShape = "openai", request_id: str = ""
) -> tuple[int, bytes]:
    """Status and document for another component's error response; 422 becomes 400, which is what OpenAI sends.

    `prompt`: the field that holds the prompt, which is the one to blame where the engine says that it is too long.
    """
    status = 400 if status == 422 else status
    message, param, code = _read(body)
    message, param = readable(message, param)
    if status == 404 and message.startswith(NOT_KEPT):
        message += " Responses are kept only with VLLM_ENABLE_RESPONSES_API_STORE=1: send the conversation as `input`."
    if status == 400 and (param in PROMPT_PARAMETERS or any(mark in message for mark in PROMPT_TOO_LONG)):
        code, param = "context_length_exceeded", prompt
    message = message or CODES.get(status, "error").replace("_", " ")
    return status, error_document(status, message, code, param, shape, request_id)


def _read(body: bytes) -> tuple[str, str | None, str | None]:
    """Message, parameter and code of vLLM's or FastAPI's error bodies."""
    try:
        data: Any = json.loads(body)
    except ValueError:
        return body.decode("utf-8", errors="replace")[:500], None, None
    if not isinstance(data, dict):
        return str(data)[:500], None, None
    error = data.get("error", data.get("detail", data))
    if not isinstance(error, dict):
        return str(error), None, None
    code, param = error.get("code"), error.get("param")
    return (
        str(error.get("message", "")),
        str(param) if param is not None else None,
        code if isinstance(code, str) else None,
    )


def stream_event(error: ApiError, shape: ErrorShape, request_id: str = "") -> bytes:
    """An error as the last event of a stream that has begun; the Responses API has a shape of its own."""
    if shape == "anthropic":
        return anthropic_event(error.body(shape, request_id))
    if shape != "responses":
        return b"data: " + error.body() + b"\n\n"
    data = {
        "type": "error", "code": error.code or CODES.get(error.status), "message": error.message,
        "param": error.param, "sequence_number": 0,
    }  # fmt: skip
    return b"event: error\ndata: " + json.dumps(data).encode() + b"\n\n"


def normalized_event(
    event: bytes, prompt: str | None = None, shape: ErrorShape = "openai", request_id: str = ""
) -> bytes:
    """Another component's error event in a stream, in the one shape."""
    body = event.partition(b"data: ")[2]
    if shape == "anthropic":
        body = engines_document(body)
    status = _status(body)
    document = normalized(status, body, prompt, shape, request_id)[1]
    return anthropic_event(document) if shape == "anthropic" else b"data: " + document + b"\n\n"


def _status(body: bytes) -> int:
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return 500
    return code if isinstance(code, int) and 400 <= code < 600 else 500


async def send_error(
    send: Send, error: ApiError, headers: Mapping[str, str], shape: ErrorShape = "openai"
) -> None:
    """Send an error as the whole response; `headers` hold the request's id."""
    body, everything = error.body(shape, headers.get("x-request-id", "")), {**headers, **error.headers}
    await send_document(
        send, error.status, body, with_limits(everything) if shape == "anthropic" else everything
    )


async def send_document(send: Send, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    """Send a JSON document as the whole response."""
    everything = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in everything.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
