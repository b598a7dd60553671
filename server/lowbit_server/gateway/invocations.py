"""`/invocations`, the one path that a cloud's endpoint has: what its body asks for, and which route answers that.

A body is a request of one of our routes, which its fields tell; SageMaker's header for attributes of one's own may name
it (`route=/v1/responses`). Or it is a list of them as Vertex AI has it, `{"instances": [...], "parameters": {...}}`,
each instance with the parameters as defaults, answered by `{"predictions": [...]}` in their order.
"""

from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers

from lowbit_server.gateway.openai_errors import ApiError
from lowbit_server.gateway.route_table import BY_PATH, INVOCATIONS, Route

ATTRIBUTES = "x-amzn-sagemaker-custom-attributes"
NAMED = "route="
BY_FIELD = (  # the first whose field a body has
    ("messages", "/v1/chat/completions"),
    ("prompt", "/v1/completions"),
    ("query", "/v1/rerank"),
    ("queries", "/v1/score"),
    ("text_1", "/v1/score"),
    ("data_1", "/v1/score"),
    ("input", "/v1/embeddings"),
)


@dataclass(frozen=True)
class Work:
    """One request in a body, and the route that answers it."""

    document: dict[str, Any]
    route: Route


def works_in(document: dict[str, Any], headers: Headers) -> list[Work]:
    """The requests in the body of an invocation; raises ApiError 400 where one cannot be told."""
    named = _named(headers)
    if "instances" not in document:
        return [Work(document, named or _told(document, "the body"))]
    instances, parameters = document["instances"], document.get("parameters") or {}
    if not isinstance(instances, list) or not instances or not isinstance(parameters, dict):
        raise _refused("`instances` is a list of requests, and `parameters` an object of their defaults")
    works = []
    for number, instance in enumerate(instances):
        where = f"instances.{number}"
        if not isinstance(instance, dict):
            raise _refused(f"{where} is no object; it is a request as /v1/chat/completions takes it", where)
        whole = {name: value for name, value in (parameters | instance).items() if not name.startswith("@")}
        if whole.get("stream"):
            raise _refused(
                f"{where}.stream: instances are answered whole; send one plain request to stream", where
            )
        works.append(Work(whole, named or _told(whole, where)))
    return works


def _named(headers: Headers) -> Route | None:
    for attribute in headers.get(ATTRIBUTES, "").split(","):
        if attribute.strip().startswith(NAMED):
            path = attribute.strip().removeprefix(NAMED)
            route = BY_PATH.get(path)
            if route is None or route.cost == "nothing" or route == INVOCATIONS:
                raise _refused(f"{ATTRIBUTES} names {path[:100]!r}, which is no route that does work")
            return route
    return None


def _told(document: dict[str, Any], where: str) -> Route:
    path = next((path for field, path in BY_FIELD if field in document), None)
    if path is None:
        fields = ", ".join(dict.fromkeys(field for field, _ in BY_FIELD))
        raise _refused(f"{where} has none of the fields that tell what it asks for: {fields}, or instances")
    return BY_PATH[path]


def _refused(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, "invocation", param=param)
