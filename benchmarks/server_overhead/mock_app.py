"""An ASGI app that streams without an engine, and our own HTTP server around it: `python mock_app.py PORT`."""

import asyncio
import sys
from pathlib import Path
from typing import Any

CHUNKS, PAUSE_S = 32, 0.03
PIECE = (
    b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","choices":[{"delta":{"content":" a"}}]}\n\n'
)


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """`/stream`: CHUNKS pieces, one every PAUSE_S; `/refuse`: an answer at once; else the body that came."""
    if scope["type"] != "http":
        return await _lifespan(receive, send) if scope["type"] == "lifespan" else None
    body = b"" if scope["path"] == "/refuse" else await _read(receive)
    kind = b"text/event-stream" if scope["path"] == "/stream" else b"text/plain"
    headers = [(b"content-type", kind)]
    if scope["path"] != "/stream":
        headers.append((b"content-length", b"%d" % (len(body) + 5)))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if scope["path"] == "/stream":
        for _ in range(CHUNKS):
            await send({"type": "http.response.body", "body": PIECE, "more_body": True})
            await asyncio.sleep(PAUSE_S)
        body = b"data: [DONE]\n\n"
    else:
        body = b"body:" + body
    await send({"type": "http.response.body", "body": body, "more_body": False})
    return None


async def _read(receive: Any) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return body
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


async def _lifespan(receive: Any, send: Any) -> None:
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _serve(port: int) -> None:
    from lowbit_server.config import ServeConfig
    from lowbit_server.http.listeners import bind
    from lowbit_server.http.serving import serving

    with bind("127.0.0.1", port) as listener:
        async with serving(app, listener, ServeConfig(Path("unused"))) as running:  # type: ignore[arg-type]
            await running.task


if __name__ == "__main__":
    import uvloop

    uvloop.run(_serve(int(sys.argv[1])))
