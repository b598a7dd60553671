"""What the port answers while the engine loads: alive, not ready, try again.

Loading blocks the event loop for a minute or more, so a thread answers on the same socket until the app takes over.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

from lowbit_server.config import ServeConfig
from lowbit_server.gateway.http_server import listen
from lowbit_server.gateway.openai_errors import error_document

STAGES = ("starting the engine", "reading back what it loaded", "opening the API")
ACCEPT_S = 0.2  # how often the thread looks whether loading has ended
CLIENT_S = 2.0  # the longest that one client may take to send its request


class Progress:
    """How far the start has come. Nearly all of its time is the engine's, which reports nothing in between."""

    def __init__(self) -> None:
        self._began, self._number = time.monotonic(), 0

    def next_stage(self) -> None:
        """The current stage has ended."""
        self._number += 1

    def document(self) -> bytes:
        seconds = round(time.monotonic() - self._began, 1)
        stage = {"stage": STAGES[self._number], "number": self._number + 1, "of": len(STAGES)}
        return json.dumps({"status": "loading", "seconds": seconds, **stage}).encode()


@contextlib.contextmanager
def answering_that_it_loads(listener: socket.socket, config: ServeConfig) -> Iterator[Progress]:
    """Answer `/livez` 200 and everything else 503 while the block runs; with TLS the port stays closed."""
    progress = Progress()
    if config.ssl_certfile is not None:
        yield progress
        return
    listen(listener)
    listener.settimeout(ACCEPT_S)
    loaded = threading.Event()
    thread = threading.Thread(target=_answer_until, args=(listener, loaded, progress), daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        loaded.set()
        thread.join()
        listener.setblocking(False)


def _answer_until(listener: socket.socket, loaded: threading.Event, progress: Progress) -> None:
    while not loaded.is_set():
        try:
            connection, address = listener.accept()
        except OSError:
            continue
        with contextlib.suppress(OSError), connection:
            connection.settimeout(CLIENT_S)
            _handler(progress)(connection, address, None)  # type: ignore[arg-type]  # it needs no server


def _handler(progress: Progress) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state = progress.document()
            if self.path == "/livez":
                self._respond(200, state)
            elif self.path in ("/readyz", "/startupz", "/health"):
                self._respond(503, state)
            else:
                self._respond(503, error_document(503, "the model is loading; try again soon"))

        do_POST = do_GET

        def _respond(self, status: int, body: bytes) -> None:
            self.send_response_only(status)
            for name, value in (
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("retry-after", "5"),
                ("connection", "close"),
            ):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """No log line for a probe."""

    return Handler
