"""What a body at `/invocations` asks for, and that each request in it passes the gateway's checks."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from tests.server.gateway.key_files import key_file
from tests.server.gateway.test_middleware import NO_LIMITS

from lowbit_server.gateway.invocations import works_in
from lowbit_server.gateway.keys import KeyStore
from lowbit_server.gateway.middleware import Gateway
from lowbit_server.gateway.openai_errors import ApiError
from lowbit_server.gateway.request_body import prompts
from lowbit_server.gateway.request_limits import Models, ServerLimits
from lowbit_server.gateway.request_tracker import RequestTracker
from lowbit_server.gateway.route_table import BY_PATH
from lowbit_server.predictions import add_predictions_route

CHAT = {"messages": [{"role": "user", "content": "hello"}]}


class Served:
    """A gateway around an app with two routes and ours for predictions; `seen` is what reached them."""

    def __init__(self, keys: KeyStore | None = None, **limits: Any) -> None:
        self.tracker, self.seen = RequestTracker(write_log=False), list[tuple[str, dict[str, Any]]]()
        inner = FastAPI()

        async def answer(request: Request) -> dict[str, Any]:
            document = await request.json()
            self.seen.append((request.url.path, document))
            self.tracker.engine_finished(f"cmpl-{request.headers['x-request-id']}", 10, 20)
            return {"path": request.url.path, "n": document.get("seed")}

        for path in ("/v1/chat/completions", "/v1/completions", "/v1/messages"):
            inner.add_api_route(path, answer, methods=["POST"])
        add_predictions_route(inner)
        models = Models("tiny", {"tiny", "poet"}.__contains__)
        gateway = Gateway(
            inner, ServerLimits(**NO_LIMITS | limits), keys, self.tracker, models, is_draining=lambda: False
        )
        transport = httpx.ASGITransport(gateway, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test")

    async def invoke(self, body: Any, **headers: str) -> httpx.Response:
        return await self.client.post("/invocations", json=body, headers=headers)


@pytest.mark.parametrize(
    ("document", "path"),
    [
        (CHAT, "/v1/chat/completions"),
        ({"prompt": "x"}, "/v1/completions"),
        ({"input": "x"}, "/v1/embeddings"),
        ({"query": "x", "documents": ["y"]}, "/v1/rerank"),
        ({"queries": "x", "documents": ["y"]}, "/v1/score"),
        ({"text_1": "x", "text_2": "y"}, "/v1/score"),
    ],
)
def test_a_body_says_which_route_it_is_for(document: dict[str, Any], path: str) -> None:
    (work,) = works_in(document, Headers())
    assert (work.route.path, work.document) == (path, document)
    attributes = Headers({"x-amzn-sagemaker-custom-attributes": "a=b,route=/v1/messages"})
    assert works_in(document, attributes)[0].route.path == "/v1/messages"


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({}, "none of the fields"),
        ({"instances": []}, "list of requests"),
        ({"instances": CHAT}, "list of requests"),
        ({"instances": [CHAT], "parameters": [1]}, "object of their defaults"),
        ({"instances": [CHAT, "hello"]}, "instances.1 is no object"),
        ({"instances": [CHAT, {"x": 1}]}, "instances.1 has none of the fields"),
        ({"instances": [CHAT | {"stream": True}]}, "instances.0.stream"),
        ({"instances": [CHAT], "parameters": {"stream": True}}, "instances.0.stream"),
    ],
)
def test_a_body_that_says_none_is_refused(document: dict[str, Any], named: str) -> None:
    with pytest.raises(ApiError) as refused:
        works_in(document, Headers())
    assert refused.value.status == 400
    assert named in refused.value.message


@pytest.mark.parametrize("path", ["/v1/nothing", "/metrics", "/invocations", "/v1/models"])
def test_a_header_names_a_route_that_does_work_or_is_refused(path: str) -> None:
    with pytest.raises(ApiError) as refused:
        works_in(CHAT, Headers({"x-amzn-sagemaker-custom-attributes": f"route={path}"}))
    assert path in refused.value.message


async def test_an_invocation_is_a_request_of_its_route_with_all_its_limits(tmp_path: Path) -> None:
    keys = KeyStore(key_file(tmp_path / "k", {"name": "a", "priority": 3, "models": ["tiny"]}))
    served = Served(keys, max_output_tokens=100)
    answer = await served.invoke(CHAT, **{"x-api-key": "a-secret"})
    assert answer.json()["path"] == "/v1/chat/completions"
    assert served.seen == [("/v1/chat/completions", CHAT | {"priority": 3})]
    assert served.tracker.tokens == {("a", "prompt"): 10, ("a", "generated"): 20}
    for body, status in (
        (CHAT | {"model": "poet"}, 403),
        (CHAT | {"model": "none"}, 404),
        (CHAT | {"max_tokens": 101}, 400),
        ({"instances": [CHAT, CHAT | {"model": "poet"}]}, 403),
        ({"instances": [CHAT, CHAT | {"max_tokens": 101}]}, 400),
    ):
        assert (await served.invoke(body, **{"x-api-key": "a-secret"})).status_code == status
    assert (await served.invoke(CHAT)).status_code == 401
    assert len(served.seen) == 1


async def test_a_route_that_is_named_has_its_own_errors() -> None:
    served, named = Served(), {"x-amzn-sagemaker-custom-attributes": "route=/v1/messages"}
    assert (await served.invoke(CHAT, **named)).json()["path"] == "/v1/messages"
    refused = await served.invoke(CHAT | {"model": "none"}, **named)
    assert (refused.status_code, refused.json()["type"]) == (404, "error")


async def test_instances_are_counted_one_by_one_and_answered_in_order(tmp_path: Path) -> None:
    entries = {"name": "a", "priority": 3}, {"name": "few", "requests_per_minute": 2}
    served = Served(KeyStore(key_file(tmp_path / "k", *entries)))
    instances = [CHAT | {"seed": 2}, {"prompt": "x", "seed": 1}, CHAT | {"seed": 3, "user": "me"}]
    body = {"instances": instances, "parameters": {"user": "all", "top_k": 1}}
    answer = await served.invoke(body, **{"x-api-key": "a-secret"})
    assert answer.json() == {"predictions": [
        {"path": "/v1/chat/completions", "n": 2}, {"path": "/v1/completions", "n": 1},
        {"path": "/v1/chat/completions", "n": 3},
    ]}  # fmt: skip
    seen = {document["seed"]: document for _, document in served.seen}
    assert [seen[n]["user"] for n in (1, 2, 3)] == ["all", "all", "me"]
    assert all(document["top_k"] == 1 and document["priority"] == 3 for document in seen.values())
    assert served.tracker.tokens == {("a", "prompt"): 30, ("a", "generated"): 60}
    assert served.tracker.outcomes == {("a", "ok"): 1}
    assert served.tracker.active == 0
    refused = await served.invoke(body, **{"x-api-key": "few-secret"})
    assert (refused.status_code, refused.headers["x-should-retry"]) == (429, "false")
    assert "3 prompts" in json.dumps(refused.json())


@pytest.mark.parametrize(
    ("path", "document", "count"),
    [
        ("/v1/embeddings", {"input": ["a", "b", "c"]}, 3),
        ("/v1/embeddings", {"input": [1, 2, 3]}, 1),
        ("/v1/embeddings", {"input": [[1, 2], [3]]}, 2),
        ("/v1/rerank", {"query": "q", "documents": ["a", "b", "c"]}, 4),
        ("/v1/score", {"text_1": "q", "text_2": ["a", "b"]}, 3),
        ("/v1/score", {"queries": ["p", "q"], "documents": ["a", "b"]}, 4),
        ("/pooling", {"messages": CHAT["messages"]}, 1),
        ("/v1/chat/completions", {"messages": [1, 2, 3], "documents": ["a", "b"]}, 1),
    ],
)
def test_each_text_that_the_engine_reads_counts_as_a_prompt(
    path: str, document: dict[str, Any], count: int
) -> None:
    assert prompts(document, BY_PATH[path]) == count
