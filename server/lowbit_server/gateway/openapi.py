"""The OpenAPI document that is served: vLLM's routes as FastAPI describes them, and the gateway's responses."""

from typing import Any

from fastapi import FastAPI

from lowbit_server.gateway.openai_errors import CODES
from lowbit_server.gateway.route_table import ROUTES, Route

METHODS = frozenset({"get", "post", "put", "delete", "patch"})
EVERYWHERE = (401, 403, 404, 431, 500)
WITH_BODY = (400, 408, 413, 415, 429, 501, 503, 504)
PROBE = (200, 503)
ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ANTHROPIC_ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"type": "string", "const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
        "request_id": {"type": "string"},
    },
}


def describe_answers(app: FastAPI) -> None:
    """Replace the app's OpenAPI document by one that names every status that a request can get."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        if "Error" not in schemas:
            schemas |= {"Error": ERROR_SCHEMA, "MessagesError": ANTHROPIC_ERROR_SCHEMA}
            if completion := schemas.get("CompletionRequest"):  # vLLM's other way in, embeddings, is off
                completion["required"] = sorted({*completion.get("required", ()), "prompt"})
            for path, operations in document["paths"].items():
                for method in METHODS & operations.keys():
                    _describe(_route(path), operations[method])
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _describe(route: Route, operation: dict[str, Any]) -> None:
    answers = operation.setdefault("responses", {})
    answers.pop("422", None)  # FastAPI's: the gateway answers 400
    if route.errors == "state":
        for status in PROBE:
            answers.setdefault(str(status), {"description": "the state, as JSON or empty"})
        return
    schema = "MessagesError" if route.errors == "anthropic" else "Error"
    work = route.cost != "nothing" or "{" in route.path
    for status in EVERYWHERE + (WITH_BODY if work else ()):
        answers[str(status)] = {
            "description": CODES.get(status, "error").replace("_", " "),
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
        }


def _route(path: str) -> Route:
    """The table's route for a path as OpenAPI writes it, which has no converters."""
    return next(route for route in ROUTES if route.path.replace(":path", "") == path)
