"""What a server's list of models may look like, and what becomes of a model that is not in it."""

import asyncio
import logging
from typing import Any

import httpx
import pytest

from lowbit_core.errors import ConfigError
from lowbit_loadtest.generate import preflight
from lowbit_loadtest.generate.http.target import Target, open_http

LISTED = {"data": [{"id": "a"}, {"id": "b"}]}


def find(answer: httpx.Response, model: str = "", chat: httpx.Response | None = None, **target: Any) -> str:
    """The model that is found where /v1/models answers so, and the chat so."""

    def respond(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return answer
        said = chat or httpx.Response(500)
        return httpx.Response(said.status_code, stream=httpx.ByteStream(said.content))

    async def run() -> str:
        there = Target("http://h", model, **target)
        async with open_http(there, httpx.MockTransport(respond)) as http:
            return await preflight.find_model(http, there)

    return asyncio.run(run())


@pytest.mark.parametrize(
    "body",
    [
        LISTED,
        [{"id": "a"}, {"id": "b"}],
        {"models": [{"name": "a"}, {"model": "b"}]},
        {"data": None, "models": ["a", "b"]},
        {"object": "list", "data": [{"id": "a", "error": None}]},
    ],
)
def test_a_list_is_read_in_each_of_its_forms(body: Any) -> None:
    assert find(httpx.Response(200, json=body)) == "a"


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(404, json={"detail": "Not Found"}),
        httpx.Response(405),
        httpx.Response(400, json={"error": {"message": "api-version is missing"}}),
        httpx.Response(500),
        httpx.Response(403, json={"error": {"message": "this key may not list models"}}),
        httpx.Response(200, text="<html>hello</html>"),
        httpx.Response(200, json={"data": []}),
        httpx.Response(200, json="a"),
        httpx.Response(204),
    ],
)
def test_without_a_list_a_named_model_goes_on_with_a_warning_and_no_name_is_refused(
    answer: httpx.Response, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("lowbit").propagate = True
    caplog.set_level(logging.INFO, logger="lowbit")  # another test may have wanted less
    assert find(answer, "m") == "m"
    assert f"lists no models ({answer.status_code}): m is asked all the same" in caplog.text
    with pytest.raises(
        ConfigError, match=r"lists no model at /v1/models .*or --model NAME|refuses the API key"
    ):
        find(answer)


def test_a_model_that_is_not_listed_and_answers_is_an_adapter() -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    answered = {"choices": [{"message": {"content": "x"}, "finish_reason": "length"}], "usage": usage}
    listed = httpx.Response(200, json=LISTED)
    assert find(listed, "adapter", httpx.Response(200, json=answered)) == "adapter"
    missing = httpx.Response(404, json={"error": {"message": "no model adapter"}})
    with pytest.raises(
        ConfigError, match=r"'adapter' is not served .*status 404: no model adapter\); served are: a, b"
    ):
        find(listed, "adapter", missing)


@pytest.mark.parametrize(
    ("answer", "target", "words"),
    [
        (httpx.Response(401), {}, "refuses the API key .401.; set LOWBIT_API_KEY"),
        (httpx.Response(401), {"api_key": "k"}, "it was sent as authorization; set LOWBIT_API_KEY, or --key-header"),
        (httpx.Response(401), {"api_key": "k", "endpoint": "messages"}, "it was sent as x-api-key"),
        (httpx.Response(401), {"model": "m"}, "refuses the API key"),
        (httpx.Response(307, headers={"location": "/there/v1/models"}), {"model": "m"},
         "status 307: redirects to http://h/there/v1/models; give --target the server itself"),
        (httpx.Response(301, headers={"location": "https://h/v1/models"}), {}, "redirects to https://h/v1/models"),
        (httpx.Response(503), {"model": "m"}, "status 503.; give the root URL of .* that is ready"),
    ],
)  # fmt: skip
def test_a_server_that_cannot_be_asked_is_refused_in_its_words(
    answer: httpx.Response, target: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        find(answer, **target)


def test_a_server_that_falls_silent_is_refused() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def run() -> str:
        listener = await asyncio.start_server(silent, "127.0.0.1", 0)
        target = Target(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
        async with listener, open_http(target) as http:
            return await preflight.find_model(http, target, timeout_s=0.05)

    with pytest.raises(ConfigError, match=r"does not answer .ReadTimeout: nothing came within 0.05 s"):
        asyncio.run(run())
