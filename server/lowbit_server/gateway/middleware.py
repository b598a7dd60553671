"""The gateway before vLLM's routers: who may ask, how much, how long, and what an error looks like.

Pure ASGI: the request's body is read once, checked and handed on, and the response streams through unchanged unless
it is an error. The checks in order: path, key, draining, body, model, limits. Then the engine works, under a deadline.
"""

import asyncio
import json
import math
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lowbit_server.gateway.key_limits import KeyUsages
from lowbit_server.gateway.keys import ANONYMOUS, Key, KeyStore
from lowbit_server.gateway.openai_errors import ApiError, send_error
from lowbit_server.gateway.request_body import BufferedReceive, parse, read_body
from lowbit_server.gateway.request_context import RequestContext
from lowbit_server.gateway.request_limits import Models, ServerLimits, estimated_tokens
from lowbit_server.gateway.request_tracker import RequestTracker
from lowbit_server.gateway.response import ResponseWriter

OPEN_PATHS = frozenset({"/health", "/livez", "/readyz", "/startupz", "/version"})
ADMIN_PATHS = frozenset({"/metrics", "/lowbit/checkpoint", "/openapi.json"})
WORK_PATHS = frozenset(  # a POST to one of these is work for the engine; /v1/responses/ID/cancel is not
    {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/tokenize", "/detokenize"}
)
LONGEST_WAIT_S = 60
BODY_S = 60.0  # the longest that a client may take to send its body
REQUEST_ID_CHARACTERS = 128
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
    ) -> None:
        self._app, self._limits, self._keys, self._models = app, limits, keys, models
        self._tracker, self._is_draining, self._admin_elsewhere = tracker, is_draining, admin_elsewhere
        self._usages = KeyUsages()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        if scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, ResponseWriter(send, {}).send)
            return
        headers = Headers(scope=scope)
        context = RequestContext(scope["path"], _request_id(headers), self._usages.of(ANONYMOUS))
        context.client_id = context.client_id or context.id
        try:
            body = await self._check(scope, receive, headers, context)
        except ApiError as error:
            self._tracker.reject(context, error.status, error.reason)
            await send_error(send, error, {"x-request-id": context.client_id})
            return
        if body is None:
            await self._app(scope, receive, ResponseWriter(send, {"x-request-id": context.client_id}).send)
            return
        self._tracker.open(context)
        try:
            await self._forward(
                _with_id(scope, context), BufferedReceive(body, receive, context), send, context
            )
        finally:
            self._tracker.close(context)

    async def _check(
        self, scope: Scope, receive: Receive, headers: Headers, context: RequestContext
    ) -> bytes | None:
        """Check a request; returns its body, or None where the engine has no work with it. Raises ApiError."""
        if sum(len(name) + len(value) for name, value in headers.raw) > self._limits.max_header_bytes:
            most = self._limits.max_header_bytes
            raise ApiError(431, f"the request head is larger than {most} bytes", "header_size")
        key = self._key_of(headers)
        context.usage = self._usages.of(key)
        if scope["path"] in ADMIN_PATHS:
            self._refuse_admin(scope["path"], key)
        if scope["method"] != "POST" or scope["path"] not in WORK_PATHS:
            return None
        self._refuse_new_work()
        try:
            body = await asyncio.wait_for(read_body(receive, headers, self._limits.max_body_bytes), BODY_S)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_S:g} s", "incomplete") from None
        document = parse(body, headers)
        changed = self._apply(document, key, context)
        context.usage.admit(context.reserved_tokens)
        return json.dumps(document, ensure_ascii=False).encode() if changed else body

    def _refuse_new_work(self) -> None:
        """Before the body is read: while the server drains, and while its queue is full."""
        if self._is_draining():
            raise ApiError(
                503, "the server is shutting down; send the request again", "draining",
                headers={"retry-after": "1", "connection": "close"},
            )  # fmt: skip
        if self._tracker.active >= self._limits.max_num_queued_reqs:  # cheaper here than in the engine
            raise ApiError(
                429, "the server is busy; try again later", "queue_full",
                headers={"retry-after": str(self._retry_after())},
            )  # fmt: skip

    def _key_of(self, headers: Headers) -> Key:
        if self._keys is None:
            return ANONYMOUS
        scheme, _, presented = headers.get("authorization", "").partition(" ")
        key = self._keys.find(presented.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise ApiError(
                401,
                "no such API key; send yours as `Authorization: Bearer …`",
                "key",
                headers={"www-authenticate": "Bearer"},
            )
        return key

    def _refuse_admin(self, path: str, key: Key) -> None:
        if self._admin_elsewhere:
            raise ApiError(404, f"{path} is answered on the admin port only", "not_admin")
        if not key.admin:
            raise ApiError(403, f"the key {key.name!r} may not read {path}", "not_admin")

    def _apply(self, document: dict[str, Any], key: Key, context: RequestContext) -> bool:
        """Check what a request asks for and estimate its tokens; returns whether the document was changed."""
        context.stream = document.get("stream") is True
        context.model = self._models.name_in(document, key)
        context.reserved_tokens = estimated_tokens(document, self._limits)
        if self._keys is None or not self._keys.uses_priorities:
            return False
        document["priority"] = key.priority  # the key's, whatever the client says
        return True

    async def _forward(
        self, scope: Scope, receive: BufferedReceive, send: Send, context: RequestContext
    ) -> None:
        headers = {"x-request-id": context.client_id, **context.usage.headers()}
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
            await send_error(send, ApiError(404, "this port answers operators only", "admin_port"), {})


def _outcome(context: RequestContext) -> str:
    if context.status == 429:
        return "queue_full"
    return "ok" if context.status < 400 else "refused" if context.status < 500 else "error"


def _request_id(headers: Headers) -> str:
    """The client's own id, reduced to what may stand in a header and a log line."""
    given = headers.get("x-request-id", "")
    return "".join(c for c in given if c.isascii() and c.isprintable())[:REQUEST_ID_CHARACTERS]


def _with_id(scope: Scope, context: RequestContext) -> Scope:
    """The engine gets our id, because a client may use the same one twice."""
    headers = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
    return {**scope, "headers": [*headers, (b"x-request-id", context.id.encode())]}


def _deadline(headers: Headers, default_s: float | None) -> float | None:
    """Seconds that a request may take: what the client asks for, at most the server's own limit."""
    try:
        asked = float(headers.get("x-request-timeout", "nan"))
    except ValueError:
        asked = math.nan
    if not (math.isfinite(asked) and asked > 0):
        return default_s
    return asked if default_s is None else min(asked, default_s)
