"""The page's files, answered before the gateway: browsers send no key when they navigate, and files hold no data.

What the page shows it asks for as any client does, with a key where keys are needed. It is answered from the start of
loading on, so that a person sees how far the start has come.
"""

import hashlib
import mimetypes
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

STATIC = Path(__file__).with_name("static")
INDEX, FILES = "/", "/lowbit/page/"
TYPES = {".js": "text/javascript", ".svg": "image/svg+xml"}  # the others as Python's own table has them
TEXT = ("text/", "image/svg", "application/json")
# Nothing but this server's own files, no inline script or style, no eval, no other host, no frame. HTML that scripts
# make must have gone through DOMPurify, whose policy for trusted types is the only one there may be.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'self'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types dompurify"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-cache",  # asked for again each time, answered 304 while it is the same
}


@dataclass(frozen=True)
class File:
    """One file as it is sent."""

    body: bytes
    headers: dict[str, str]


class Page:
    """The files by path. `root_path`: a proxy's prefix, without a slash at its end; `keys`: whether data needs one."""

    def __init__(self, root_path: str = "", *, keys: bool = False, folder: Path = STATIC) -> None:
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        self._files = {FILES + name: _file(name, (folder / name).read_bytes()) for name in names}
        index = (folder / "index.html").read_text(encoding="utf-8")
        # Without a prefix addresses are relative to the page's own, wherever a proxy has put it.
        base = f'<base href="{root_path}/">' if root_path else ""
        index = index.replace("<!-- base -->", base).replace("data-keys=no", f"data-keys={_yes(keys)}")
        del self._files[FILES + "index.html"]
        self._files[INDEX] = _file("index.html", index.encode())

    @property
    def paths(self) -> frozenset[str]:
        """What is answered here."""
        return frozenset(self._files)

    def before(self, app: ASGIApp) -> ASGIApp:
        """An app that answers the page and hands everything else on."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            file = self._files.get(scope["path"]) if scope["type"] == "http" else None
            if file is None or scope["method"] != "GET":
                await app(scope, receive, send)
            else:
                await _send(file, Headers(scope=scope), send)

        return answer


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _file(name: str, body: bytes) -> File:
    kind = TYPES.get(Path(name).suffix) or mimetypes.guess_type(name)[0] or "text/plain"
    charset = "; charset=utf-8" if kind.startswith(TEXT) else ""
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    return File(body, {"content-type": kind + charset, "etag": etag, **HEADERS})


async def _send(file: File, asked: Headers, send: Send) -> None:
    known = file.headers["etag"] in asked.get("if-none-match", "")
    headers = file.headers if known else {**file.headers, "content-length": str(len(file.body))}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 304 if known else 200, "headers": raw})
    await send({"type": "http.response.body", "body": b"" if known else file.body})
