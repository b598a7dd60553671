"""What the port answers while the engine loads: alive, not ready, try again.

The same HTTP server answers from the first second on, so heads, bodies and slow clients are bounded as later, and
nobody's connection keeps the app from taking over.
"""

import json
import time
from typing import Any

from starlette.types import Receive, Scope, Send

from lowbit_server.gateway.openai_errors import ApiError, send_document, send_error
from lowbit_server.gateway.route_table import route_at

STAGES = ("starting the engine", "reading back what it loaded", "opening the API")
PROBES = {"/livez": 200, "/health": 503, "/readyz": 503, "/startupz": 503, "/ping": 503}
RETRY_AFTER_S = 5


class Loading:
    """The app until there is one. Nearly all of its time is the engine's, which reports nothing in between."""

    def __init__(self) -> None:
        self._began, self._number = time.monotonic(), 0

    def next_stage(self) -> None:
        """The current stage has ended."""
        self._number += 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = PROBES.get(scope["path"])
        again = {"retry-after": str(RETRY_AFTER_S)}
        if status is None:
            error = ApiError(503, "the model is loading; try again soon", "loading", headers=again)
            await send_error(send, error, {}, route_at(scope["path"]).errors)
        elif scope["method"] != "GET":
            allowed = {"allow": "GET, HEAD"}
            await send_error(send, ApiError(405, "Method Not Allowed", "method", headers=allowed), {})
        else:
            await send_document(send, status, json.dumps(self.document()).encode(), again)

    def document(self) -> dict[str, Any]:
        """How far the start has come."""
        seconds = round(time.monotonic() - self._began, 1)
        stage = {"stage": STAGES[self._number], "number": self._number + 1, "of": len(STAGES)}
        return {"status": "loading", "seconds": seconds, **stage}
