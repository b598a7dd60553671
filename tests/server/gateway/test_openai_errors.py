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


def union(role: str) -> list[str]:
    """What vLLM lists for a message of this role without content: each kind of message, and what is wrong as that."""
    found = []
    for kind in ("Developer", "System", "User", "Assistant"):
        place = f"body.messages.0.ChatCompletion{kind}MessageParam"
        found.append({"type": "string_type", "loc": f"{place}.content", "msg": "Input should be a string"})
        found.append({"type": "iterable_type", "loc": f"{place}.content", "msg": "Input should be iterable"})
        if kind.lower() != role:
            said = {
                "type": "literal_error",
                "loc": f"{place}.role",
                "msg": f"Input should be {kind.lower()!r}",
            }
            found.append(said)
    return [f"  {one}" for one in found]


PYDANTIC = """2 validation errors for ValidatorIterator
0.ChatCompletionContentPartTextParam.text
  Field required [type=missing, input_value={'type': 'text'}, input_type=dict]
    For further information visit https://errors.pydantic.dev/2.14/v/missing
0.File.type
  Input should be 'file' [type=literal_error, input_value='text', input_type=str]
    For further information visit https://errors.pydantic.dev/2.14/v/literal_error"""


@pytest.mark.parametrize(
    ("message", "said", "param"),
    [
        (
            "\n".join(["11 validation errors:", *union("user"), "  ...and 9 more errors"]),
            "messages.0.content: Input should be a string, or Input should be iterable",
            "messages.0.content",
        ),
        (
            "1 validation error:\n  {'type': 'missing', 'loc': 'body.messages', 'msg': 'Field required'}",
            "messages: Field required",
            "messages",
        ),
        (
            "1 validation error:\n  {'type': 'value_error', 'loc': 'body.max_tokens', 'msg': 'Value error, it must be "
            "positive', 'input': '0', 'ctx': {'error': ValueError('it must be positive')}}",
            "max_tokens: it must be positive",
            "max_tokens",
        ),
        (
            "2 validation errors:\n  {'type': 'int', 'loc': 'body.n', 'msg': 'a'}\n  {'loc': 'body.top_p', 'msg': 'b'}",
            "n: a; top_p: b",
            "n",
        ),
        (PYDANTIC, "0.text: Field required", "body.given"),
        (
            "3 validation errors: and other words\n  {'loc': 'x'}",
            "3 validation errors: and other words\n  {'loc': 'x'}",
            "body.given",
        ),
        ("2 validation errors:\n  {'loc': 1, cut", "2 validation errors:\n  {'loc': 1, cut", "body.given"),
    ],
)
def test_a_list_of_validation_errors_becomes_one_line_with_the_clients_fields(
    message: str, said: str, param: str
) -> None:
    found = json.loads(normalized(422, engines(message, "body.given"))[1])["error"]
    assert (found["message"], found["param"]) == (said, param)


def test_a_response_that_was_not_kept_says_what_to_send() -> None:
    found = json.loads(normalized(404, engines("Response with id 'resp_1' not found.", "response_id"))[1])
    assert found["error"]["message"].endswith("send the conversation as `input`.")
