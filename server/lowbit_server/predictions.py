"""The instances of one prediction, each asked of the route that answers it, and their answers as one.

Behind the gateway, which has checked and counted them all: here they only go to the app that this route is part of.
"""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp, Message, Scope

from lowbit_server.gateway.invocations import works_in
from lowbit_server.gateway.route_table import INVOCATIONS

KEPT = ("type", "asgi", "http_version", "scheme", "server", "client", "root_path", "headers")


@dataclass
class _Instance:
    """One request to the app and its whole answer."""

    body: bytes | None
    gone: asyncio.Event
    status: int = 0
    answer: list[bytes] = field(default_factory=list)

    async def receive(self) -> Message:
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.answer.append(message.get("body", b""))


def add_predictions_route(app: FastAPI) -> None:
    """`/invocations` for a body of instances; any other body the gateway has sent where its fields say."""

    @app.post(INVOCATIONS.path, tags=["clouds"])
    async def invocations(request: Request) -> Response:
        works = works_in(await request.json(), request.headers)
        gone = asyncio.Event()
        instances = [
            _Instance(json.dumps(work.document, ensure_ascii=False).encode(), gone) for work in works
        ]
        watch = asyncio.create_task(_until_left(request, gone))
        try:
            async with asyncio.TaskGroup() as group:
                for number, (work, instance) in enumerate(zip(works, instances, strict=True)):
                    scope = _scope(request.scope, work.route.path, number)
                    group.create_task(_ask(app, scope, instance))
        finally:
            watch.cancel()
        if failed := next((one for one in instances if one.status != 200), None):
            return Response(b"".join(failed.answer), failed.status, media_type="application/json")
        predictions: list[Any] = [json.loads(b"".join(one.answer)) for one in instances]
        return Response(
            json.dumps({"predictions": predictions}, ensure_ascii=False), media_type="application/json"
        )


async def _ask(app: ASGIApp, scope: Scope, instance: _Instance) -> None:
    await app(scope, instance.receive, instance.send)


async def _until_left(request: Request, gone: asyncio.Event) -> None:
    while not gone.is_set():
        if (await request.receive())["type"] == "http.disconnect":
            gone.set()


def _scope(scope: Scope, path: str, number: int) -> Scope:
    """Each instance has the request's id and its own number, by which the engine's count finds the request."""
    headers = [
        (name, value + b"-%d" % number if name == b"x-request-id" else value)
        for name, value in scope["headers"]
        if name != b"content-length"
    ]
    kept = {name: scope[name] for name in KEPT if name in scope}
    return {
        **kept, "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers,
        "state": {},
    }  # fmt: skip
