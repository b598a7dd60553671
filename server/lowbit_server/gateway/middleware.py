"""What stands before vLLM's routers: who may ask, how much, how long, and what an error looks like.

Pure ASGI: a request's body is read once, checked and handed on; the answer streams through untouched unless it is
an error. The order: path, key, drain, body, model, limits; then the engine, under a deadline.
"""

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lowbit_server.gateway.key_limits import KeyUsages
from lowbit_server.gateway.keys import ANONYMOUS, Key, KeyStore
from lowbit_server.gateway.openai_errors import ApiError, send_error
from lowbit_server.gateway.request_body import (
    BufferedReceive,
    output_tokens,
    parse,
    prompt_characters,
    read_body,
)
from lowbit_server.gateway.request_context import RequestContext
from lowbit_server.gateway.request_tracker import RequestTracker
from lowbit_server.gateway.response import ResponseWriter

OPEN_PATHS = frozenset({"/health", "/livez", "/readyz", "/startupz", "/version"})
ADMIN_PATHS = frozenset({"/metrics", "/lowbit/checkpoint", "/openapi.json"})
WORK_PATHS = frozenset(  # what is posted there is work for the engine; /v1/responses/ID/cancel is not
    {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/tokenize", "/detokenize"}
)
CHARACTERS_PER_TOKEN = 4  # of an estimate that the engine's count replaces
LONGEST_WAIT_S = 60
BODY_S = 60.0  # how long a client may take to send its body
REQUEST_ID_CHARACTERS = MODEL_CHARACTERS = 128
ABORT_S = 2.0  # how long the app may take to notice that its client is gone


@dataclass(frozen=True)
class ServerLimits:
    """The server's own limits, whoever asks."""

    max_num_queued_reqs: int
    max_header_bytes: int
    max_body_bytes: int
    max_prompt_characters: int | None
    max_output_tokens: int | None
    request_timeout_s: float | None


@dataclass(frozen=True)
class Models:
    """What may stand under `model`; without it, `default` answers."""

    default: str
    known: Callable[[str], bool]


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
        """The body to hand on, or None for a request that the engine does not work on; raises ApiError."""
        if sum(len(name) + len(value) for name, value in headers.raw) > self._limits.max_header_bytes:
            most = self._limits.max_header_bytes
            raise ApiError(431, f"the request head is larger than {most} bytes", "header_size")
        key = self._key_of(headers)
        context.usage = self._usages.of(key)
        if scope["path"] in ADMIN_PATHS:
            self._refuse_admin(scope["path"], key)
        if scope["method"] != "POST" or scope["path"] not in WORK_PATHS:
            return None
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
        try:
            body = await asyncio.wait_for(read_body(receive, headers, self._limits.max_body_bytes), BODY_S)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_S:g} s", "incomplete") from None
        document = parse(body, headers)
        changed = self._apply(document, key, context)
        context.usage.admit(context.reserved_tokens)
        return json.dumps(document, ensure_ascii=False).encode() if changed else body

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
        context.model = self._model_of(document, key)
        wanted, size = output_tokens(document), prompt_characters(document)
        most = self._limits.max_output_tokens
        if most is not None and wanted > most:
            message = f"{wanted} output tokens are asked for; this server allows {most}"
            raise ApiError(400, message, "max_tokens", code="max_tokens_too_large", param="max_tokens")
        longest = self._limits.max_prompt_characters
        if longest is not None and size > longest:
            message = f"the prompt has {size} characters; this server allows {longest}"
            raise ApiError(400, message, "prompt_size", code="context_length_exceeded")
        context.reserved_tokens = size // CHARACTERS_PER_TOKEN + wanted
        if self._keys is None or not self._keys.uses_priorities:
            return False
        document["priority"] = key.priority  # the key's, whatever the client says
        return True

    def _model_of(self, document: dict[str, Any], key: Key) -> str:
        given = document.get("model")
        model = given if isinstance(given, str) and given else self._models.default
        if not self._models.known(model):
            message = f"there is no model {model[:MODEL_CHARACTERS]!r} here; /v1/models lists those there are"
            raise ApiError(404, message, "no_such_model", code="model_not_found", param="model")
        if key.models is not None and model not in key.models:
            message = f"the key {key.name!r} may not use the model {model!r}"
            raise ApiError(403, message, "model", code="model_not_found", param="model")
        return model

    async def _forward(
        self, scope: Scope, receive: BufferedReceive, send: Send, context: RequestContext
    ) -> None:
        headers = {"x-request-id": context.client_id, **context.usage.headers()}
        answer = ResponseWriter(send, headers, context, self._retry_after)
        timeout_s = _deadline(Headers(scope=scope), self._limits.request_timeout_s)
        try:
            if timeout_s is None:
                await self._app(scope, receive, answer.send)
            else:
                await self._run_until(timeout_s, scope, receive, answer, context)
        except asyncio.CancelledError:
            context.outcome = context.outcome or "client_gone"
            raise
        except Exception:
            context.outcome = "error"
            await answer.fail(ApiError(500, "the server failed on this request", "error"))
            raise
        context.outcome = context.outcome or _outcome(context)

    async def _run_until(
        self,
        timeout_s: float,
        scope: Scope,
        receive: BufferedReceive,
        answer: ResponseWriter,
        context: RequestContext,
    ) -> None:
        """Run the app for at most `timeout_s`; then it is told that the client has gone, on which vLLM aborts."""
        app = asyncio.ensure_future(self._app(scope, receive, answer.send))
        try:
            done, _ = await asyncio.wait({app}, timeout=timeout_s)
            if not done:
                context.outcome = "deadline"
                await answer.fail(ApiError(504, f"not finished within {timeout_s:g} s", "deadline"))
                receive.pretend_gone.set()
                done, _ = await asyncio.wait({app}, timeout=ABORT_S)
            if done and context.outcome != "deadline":
                await app
        finally:
            app.cancel()
            await asyncio.gather(app, return_exceptions=True)

    def _retry_after(self) -> int:
        """Seconds until a place in the queue should be free, by the rate at which requests ended of late."""
        rate = self._tracker.finished.per_second()
        return min(LONGEST_WAIT_S, max(1, math.ceil(1 / rate))) if rate > 0 else 5


class AdminPort:
    """What a port for operators answers: health and the admin paths, without a key, and nothing else."""

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
    """The client's own id, as far as it can stand in a header and a log line."""
    given = headers.get("x-request-id", "")
    return "".join(c for c in given if c.isascii() and c.isprintable())[:REQUEST_ID_CHARACTERS]


def _with_id(scope: Scope, context: RequestContext) -> Scope:
    """The engine knows a request by our id: a client's could be used twice."""
    headers = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
    return {**scope, "headers": [*headers, (b"x-request-id", context.id.encode())]}


def _deadline(headers: Headers, default_s: float | None) -> float | None:
    """Seconds that a request may take: the client's wish up to the server's default."""
    try:
        asked = float(headers.get("x-request-timeout", "nan"))
    except ValueError:
        asked = math.nan
    if not (math.isfinite(asked) and asked > 0):
        return default_s
    return asked if default_s is None else min(asked, default_s)
