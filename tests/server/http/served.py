"""The whole gateway on a port, before an engine that is not vLLM: what tests of raw sockets talk to."""

import asyncio
import json
import re
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.responses import Response
from tests.server.http.odd_exchanges import Exchange, sized
from tests.server.http.raw_sockets import read_to_the_end

from lowbit_server.config import ServeConfig
from lowbit_server.gateway.middleware import Gateway
from lowbit_server.gateway.request_limits import Models, ServerLimits
from lowbit_server.gateway.request_tracker import RequestTracker
from lowbit_server.http.endings import Times
from lowbit_server.http.entrance import Entrance
from lowbit_server.http.listeners import bind
from lowbit_server.http.serving import Serving, serving

TIMES = Times(
    head_s=0.5, body_s=0.8, unread_s=0.5, stalled_s=0.8, left_s=0.5, ask_s=(0.05, 0.1, 0.3), idle_s=1
)
BOUND_S = 4.0  # several bounds one after the other: a head, its body, the rest, the idle connection
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
GOOD = sized(b'{"messages": []}')


def engine() -> FastAPI:
    """Answers chats, whole or as a stream, and the probes."""
    app = FastAPI()

    async def events() -> AsyncIterator[bytes]:
        for number in range(5):
            yield b'data: {"n": %d}\n\n' % number
            await asyncio.sleep(0.005)
        yield b"data: [DONE]\n\n"

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        document = await request.json()
        if document.get("stream") is True:
            return StreamingResponse(events(), media_type="text/event-stream")
        await asyncio.sleep(0.005)
        return Response(json.dumps({"choices": []}), media_type="application/json")

    for path in ("/livez", "/v1/models", "/metrics"):
        app.add_api_route(path, lambda: {"ok": True}, methods=["GET"])
    return app


class Served:
    """The server, and what it has counted."""

    def __init__(self, port: int, serving: Serving, tracker: RequestTracker) -> None:
        self.port, self.serving, self.tracker = port, serving, tracker

    async def answers(self, exchange: Exchange) -> bytes:
        """What comes back until the server closes, or the client leaves as the exchange says."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            await _send(exchange, writer)
            if exchange.ending in ("leave", "reset"):
                return b""
            return await asyncio.wait_for(read_to_the_end(reader), BOUND_S)
        finally:
            writer.close()

    async def answers_a_good_request(self) -> bool:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(GOOD)
        found = await asyncio.wait_for(reader.readuntil(b'{"choices": []}'), 5)
        writer.close()
        return found.startswith(b"HTTP/1.1 200")


async def _send(exchange: Exchange, writer: asyncio.StreamWriter) -> None:
    try:
        for piece in exchange.pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(exchange.pause_s)
        if exchange.ending == "half close":
            writer.write_eof()
    except (ConnectionError, RuntimeError):  # the server has closed meanwhile
        return
    if exchange.ending == "reset":
        sock = writer.get_extra_info("socket")
        if sock is not None:  # None where the server was faster and has reset the connection itself
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@asynccontextmanager
async def serving_the_gateway() -> AsyncIterator[Served]:
    config = ServeConfig(Path("unused"), max_header_bytes=8192, max_body_bytes=1 << 20)
    limits = ServerLimits(
        max_num_queued_reqs=1000, max_header_bytes=8192, max_body_bytes=1 << 20, max_prompt_characters=None,
        max_output_tokens=None, request_timeout_s=None,
    )  # fmt: skip
    tracker = RequestTracker(write_log=False)
    models = Models("tiny", {"tiny"}.__contains__)
    gateway = Gateway(engine(), limits, None, tracker, models, is_draining=lambda: False)
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        async with serving(Entrance(gateway, "", 1 << 20), listener, config, TIMES) as running:
            yield Served(port, running, tracker)
