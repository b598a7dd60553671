"""What every request passes first, whatever answers it: HTTP's general rules, so that nothing behind knows of them.

HEAD is a GET whose body the HTTP server drops; a path may come with the prefix that a proxy has for this server, and
with a slash at its end; a body may be compressed; a cloud may ask for one of ours by another path. Behind it is the
answer that the model loads, and then the gateway.
"""

from collections.abc import Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from lowbit_server.http.content_encoding import PLAIN, Inflating, encoding_of

NO_ALIASES: Mapping[tuple[str, str], str] = {}


class Entrance:
    """The outermost app. `root_path` is a proxy's prefix, without a slash at its end; `most` bounds a body's bytes.

    `aliases`: by method and path, the path of ours that is meant.
    """

    def __init__(
        self, app: ASGIApp, root_path: str, most: int, aliases: Mapping[tuple[str, str], str] = NO_ALIASES
    ) -> None:
        self._app, self._root_path, self._most, self._aliases = app, root_path, most, aliases

    def open(self, app: ASGIApp) -> None:
        """From the next request on `app` answers."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        elif scope["method"] == "POST" and (encoding := encoding_of(scope)) not in PLAIN:
            scope, receive = _without_encoding(scope), Inflating(encoding, receive, self._most)
        path = self._below_root(scope["path"]) if self._root_path else scope["path"]
        if path.endswith("/"):
            path = (
                path.rstrip("/") or "/"
            )  # in place of a redirect, which behind a proxy names the wrong address
        path = self._aliases.get((scope["method"], path), path)
        if path != scope["path"]:
            scope = {**scope, "path": path}
        await self._app(scope, receive, send)

    def _below_root(self, path: str) -> str:
        """Proxies that strip their prefix and those that pass it on reach the same routes.

        ASGI's `root_path` stays empty: routers strip it too, and stripped twice a path is another one for the gateway.
        """
        below = path.removeprefix(self._root_path) or "/"
        return below if below.startswith("/") else path


def _without_encoding(scope: Scope) -> Scope:
    """The scope of the plain body, whose length nobody knows yet."""
    gone = (b"content-encoding", b"content-length")
    return {**scope, "headers": [header for header in scope["headers"] if header[0] not in gone]}
