"""Other components' errors, in the one shape and with the parameter that the client sent."""

import json
from typing import Any

import pytest

from lowbit_server.gateway.openai_errors import normalized, normalized_event
from lowbit_server.gateway.route_table import ROUTES

TOO_LONG = (
    ("This model's maximum context length is 8192 tokens. However, your prompt contains 9001 input", "input_tokens"),
    ("This model's maximum context length is 8192 tokens. However, your prompt contains 99 characters", "input_text"),
    ("The decoder prompt (length 9000) is longer than the maximum model length of 8192.", None),
    ("The decoder prompt (length 9) plus the number of requested output tokens (at least 1) is", None),
)  # fmt: skip


def engines(message: str, param: str | None) -> bytes:
    error = {"message": message, "type": "BadRequestError", "param": param, "code": 400}
    return json.dumps({"error": error}).encode()


@pytest.mark.parametrize(
    "route", [route for route in ROUTES if route.prompt], ids=lambda route: str(route.path)
)
@pytest.mark.parametrize(("message", "param"), TOO_LONG)
def test_a_prompt_over_the_context_names_the_field_that_holds_it(
    route: Any, message: str, param: str | None
) -> None:
    status, body = normalized(400, engines(message, param), route.prompt)
    found = json.loads(body)["error"]
    assert (status, found["code"], found["param"]) == (400, "context_length_exceeded", route.prompt)
    assert found["message"] == message
    event = normalized_event(b"data: " + engines(message, param) + b"\n\n", route.prompt)
    assert json.loads(event.removeprefix(b"data: "))["error"] == found


def test_other_errors_keep_their_parameter() -> None:
    found = json.loads(
        normalized(400, engines("max_tokens=9 cannot be greater", "max_tokens"), "messages")[1]
    )["error"]
    assert (found["code"], found["param"]) == ("invalid_request", "max_tokens")
    assert (
        json.loads(normalized(500, engines("x", "input_tokens"), "messages")[1])["error"]["code"]
        == "internal_error"
    )
