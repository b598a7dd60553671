"""The gateway before vLLM's routers: who may ask, how much, how long, and what an error looks like.

Pure ASGI: the request's body is read once, checked and handed on, and the response streams through unchanged unless
it is an error. The checks in order: path, key, draining, a place, body, model, limits. Then the engine works, under a
deadline. What the request holds meanwhile is its lease's, which is closed in one place whatever happens.
"""

import asyncio
import json
import math
import time
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lowbit_server.cost.usage_book import UsageBook
from lowbit_server.gateway.invocations import works_in
from lowbit_server.gateway.key_limits import KeyUsage, KeyUsages
from lowbit_server.gateway.keys import ANONYMOUS, Key, KeyStore
from lowbit_server.gateway.lease import BODIES_AT_ONCE, Capacity, Lease
from lowbit_server.gateway.openai_errors import ApiError, send_error
from lowbit_server.gateway.presented_key import presented_key, refused
from lowbit_server.gateway.request_body import BufferedReceive, parse, read_body
from lowbit_server.gateway.request_context import RequestContext
from lowbit_server.gateway.request_limits import Models, ServerLimits, demand_of_all
from lowbit_server.gateway.request_tracker import RequestTracker
from lowbit_server.gateway.response import ResponseWriter
from lowbit_server.gateway.route_table import INVOCATIONS, Route, paths_for, route_at

OPEN_PATHS, ADMIN_PATHS = paths_for("everyone"), paths_for("admin")
LONGEST_WAIT_S = 60
BODY_S = 60.0  # the longest that a client may take to send its body
REQUEST_ID_CHARACTERS = 128
PRIORITY_HEADER = b"x-vllm-priority"  # goes before a body's `priority` in vLLM (tests/contract)
ABORT_S = 2.0  # how long the app may take to notice that its client has disconnected


class Gateway:
    """ASGI middleware around the whole app."""

    def __init__(
        self,
        app: ASGIApp,
        limits: ServerLimits,
        keys: KeyStore | None,
        tracker: RequestTracker,
        models: Models,
        is_draining: Callable[[], bool],
        admin_elsewhere: bool = False,
        clock: Callable[[], float] = time.monotonic,
        usage: UsageBook | None = None,
    ) -> None:
        self._app, self._limits, self._keys, self._models = app, limits, keys, models
        self._tracker, self._is_draining, self._admin_elsewhere = tracker, is_draining, admin_elsewhere
        self._capacity = Capacity(
            limits.max_num_queued_reqs, BODIES_AT_ONCE * limits.max_body_bytes, self._retry_after
        )
        self._usages, self._anonymous = KeyUsages(clock, usage), KeyUsage(ANONYMOUS, clock)
        if keys is not None:
            keys.on_change = self._usages.replace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        route = route_at(scope["path"])
        if route.access == "everyone":
            await self._app(scope, receive, ResponseWriter(send, {}).send)
            return
        headers, lease = Headers(scope=scope), Lease(self._capacity, self._anonymous)
        context = RequestContext(scope["path"], _request_id(headers), lease, route)
        context.client_id = context.client_id or context.id
        try:
            await self._answer(scope, receive, send, headers, context)
        finally:  # whatever was raised
            lease.close()
            self._tracker.close(context)

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, headers: Headers, context: RequestContext
    ) -> None:
        try:
            body = await self._check(scope, receive, headers, context)
        except ApiError as error:
            await self._refuse(send, error, context)
        except Exception:
            await self._refuse(send, ApiError(500, "the server failed on this request", "error"), context)
            raise
        else:
            if body is None:
                writer = ResponseWriter(send, context.id_headers, shape=context.route.errors)
                await self._app(scope, receive, writer.send)
                return
            self._tracker.open(context)
            context.overhead_s += time.monotonic() - context.began
            await self._forward(
                _for_engine(scope, context, self._priority_of(context)),
                BufferedReceive(body, receive, context),
                send,
                context,
            )

    async def _refuse(self, send: Send, error: ApiError, context: RequestContext) -> None:
        context.lease.close()  # nobody else waits while the client reads that it was refused
        self._tracker.reject(context, error.status, error.reason)
        await send_error(send, error, context.id_headers, context.route.errors)

    async def _check(
        self, scope: Scope, receive: Receive, headers: Headers, context: RequestContext
    ) -> bytes | None:
        """Check a request; returns its body, or None where the engine has no work with it. Raises ApiError."""
        if sum(len(name) + len(value) for name, value in headers.raw) > self._limits.max_header_bytes:
            most = self._limits.max_header_bytes
            raise ApiError(431, f"the request head is larger than {most} bytes", "header_size")
        key = self._key_of(headers)
        lease, most = context.lease, self._limits.max_body_bytes
        lease.usage = self._anonymous if key is ANONYMOUS else self._usages.of(key)
        if context.route.access == "admin":
            self._refuse_admin(context.path, key)
        if scope["method"] != "POST" or context.route.cost == "nothing":
            return None
        self._refuse_while_draining()
        lease.enter()
        waits = time.monotonic()
        try:
            body = await asyncio.wait_for(read_body(receive, headers, most, lease.hold), BODY_S)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_S:g} s", "incomplete") from None
        context.overhead_s = (
            waits - time.monotonic()
        )  # what follows adds the whole time until the engine has it
        document = parse(body, headers)
        try:
            if context.route == INVOCATIONS:
                document, works = self._invoked(document, headers, context)
            else:
                works = [(document, context.route)]
            changed = [self._apply(one, key, context) for one, _ in works]
            lease.charge(demand_of_all(works, self._limits))
            whole = not any(changed) and context.route != INVOCATIONS
            return body if whole else json.dumps(document, ensure_ascii=False).encode()
        except RecursionError:
            raise ApiError(
                400, "the request body is nested too deeply", "json", code="invalid_json"
            ) from None

    def _invoked(
        self, document: dict[str, Any], headers: Headers, context: RequestContext
    ) -> tuple[dict[str, Any], list[tuple[dict[str, Any], Route]]]:
        """What an invocation becomes: a request of another route, or instances, each with the fields that it needs."""
        works = [(work.document, work.route) for work in works_in(document, headers)]
        if "instances" in document:
            return {"instances": [one for one, _ in works]}, works
        context.route = works[0][1]
        return document, works

    def _refuse_while_draining(self) -> None:
        if self._is_draining():
            raise ApiError(
                503, "the server is shutting down; send the request again", "draining",
                headers={"retry-after": "1", "connection": "close"},
            )  # fmt: skip

    def _key_of(self, headers: Headers) -> Key:
        if self._keys is None:
            return ANONYMOUS
        key = self._keys.find(presented_key(headers))
        if key is None:
            raise refused(
                "no such API key; send yours as `Authorization: Bearer …`, `x-api-key` or `api-key`"
            )
        return key

    def _refuse_admin(self, path: str, key: Key) -> None:
        if self._admin_elsewhere:
            raise ApiError(404, f"{path} is answered on the admin port only", "not_admin")
        if not key.admin:
            raise ApiError(403, f"the key {key.name!r} may not read {path}", "not_admin")

    def _apply(self, document: dict[str, Any], key: Key, context: RequestContext) -> bool:
        """Check which model a request asks for, and set its priority; returns whether the document was changed."""
        context.stream = document.get("stream") is True
        context.model = self._models.name_in(document, key)
        if self._keys is None or not (self._keys.uses_priorities or "priority" in document):
            return False
        document["priority"] = key.priority  # the key's, whatever the client says
        return True

    def _priority_of(self, context: RequestContext) -> int | None:
        """A key's priority, where there are any; some APIs have no field for it."""
        return (
            context.lease.usage.key.priority
            if self._keys is not None and self._keys.uses_priorities
            else None
        )

    async def _forward(
        self, scope: Scope, receive: BufferedReceive, send: Send, context: RequestContext
    ) -> None:
        headers = {**context.id_headers, **context.lease.usage.headers()}
        writer = ResponseWriter(send, headers, context, self._retry_after)
        timeout_s = _deadline(Headers(scope=scope), self._limits.request_timeout_s)
        try:
            if timeout_s is None:
                await self._app(scope, receive, writer.send)
            else:
                await self._run_until(timeout_s, scope, receive, writer, context)
        except asyncio.CancelledError:
            context.outcome = context.outcome or "client_gone"
            raise
        except Exception:
            context.outcome = "error"
            await writer.fail(ApiError(500, "the server failed on this request", "error"))
            raise
        context.outcome = context.outcome or _outcome(context)

    async def _run_until(
        self,
        timeout_s: float,
        scope: Scope,
        receive: BufferedReceive,
        writer: ResponseWriter,
        context: RequestContext,
    ) -> None:
        """Run the app for at most `timeout_s`, then tell it that the client has disconnected, on which vLLM aborts."""
        app = asyncio.ensure_future(self._app(scope, receive, writer.send))
        try:
            done, _ = await asyncio.wait({app}, timeout=timeout_s)
            if not done:
                context.outcome = "deadline"
                await writer.fail(ApiError(504, f"not finished within {timeout_s:g} s", "deadline"))
                receive.pretend_disconnect.set()
                done, _ = await asyncio.wait({app}, timeout=ABORT_S)
            if done and context.outcome != "deadline":
                await app
        finally:
            app.cancel()
            await asyncio.gather(app, return_exceptions=True)

    def _retry_after(self) -> int:
        """Seconds until a place in the queue should be free, by the rate at which requests have ended recently."""
        rate = self._tracker.finished.per_second()
        return min(LONGEST_WAIT_S, max(1, math.ceil(1 / rate))) if rate > 0 else 5


class AdminPort:
    """The app on the operators' port: health and the admin paths without a key, and nothing else."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in OPEN_PATHS | ADMIN_PATHS:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            error = ApiError(404, "this port answers operators only", "admin_port")
            await send_error(send, error, {}, route_at(scope["path"]).errors)


def _outcome(context: RequestContext) -> str:
    if context.status == 429:
        return "queue_full"
    return "ok" if context.status < 400 else "refused" if context.status < 500 else "error"


def _request_id(headers: Headers) -> str:
    """The client's own id, reduced to what may stand in a header and a log line."""
    given = headers.get("x-request-id", "")
    return "".join(c for c in given if c.isascii() and c.isprintable())[:REQUEST_ID_CHARACTERS]


def _for_engine(scope: Scope, context: RequestContext, priority: int | None) -> Scope:
    """The engine gets our id, because a client may use the same one twice, and the key's priority, not the client's."""
    ours = {b"x-request-id": context.id.encode()}
    if priority is not None:
        ours[PRIORITY_HEADER] = str(priority).encode()
    headers = [(name, value) for name, value in scope["headers"] if name not in (*ours, PRIORITY_HEADER)]
    path = context.route.path or scope["path"]  # another one for an invocation
    return {**scope, "path": path, "raw_path": path.encode(), "headers": [*headers, *ours.items()]}


def _deadline(headers: Headers, default_s: float | None) -> float | None:
    """Seconds that a request may take: what the client asks for, at most the server's own limit."""
    try:
        asked = float(headers.get("x-request-timeout", "nan"))
    except ValueError:
        asked = math.nan
    if not (math.isfinite(asked) and asked > 0):
        return default_s
    return asked if default_s is None else min(asked, default_s)
