"""What the port answers while the engine loads: alive, not ready, come back.

Loading blocks the event loop for a minute or more; a thread answers on the same socket until the app takes over.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

from lowbit_server.config import ServeConfig
from lowbit_server.drain import listen
from lowbit_server.openai_errors import document

ACCEPT_S = 0.2  # how often the thread looks whether loading has ended
CLIENT_S = 2.0  # how long one client may take to ask


@contextlib.contextmanager
def answering_that_it_loads(listener: socket.socket, config: ServeConfig) -> Iterator[None]:
    """Answer `/livez` 200 and everything else 503 while the block runs; with TLS the port stays closed."""
    if config.ssl_certfile is not None:
        yield
        return
    listen(listener)
    listener.settimeout(ACCEPT_S)
    loaded, began = threading.Event(), time.monotonic()
    thread = threading.Thread(target=_answer_until, args=(listener, loaded, began), daemon=True)
    thread.start()
    try:
        yield
    finally:
        loaded.set()
        thread.join()
        listener.setblocking(False)


def _answer_until(listener: socket.socket, loaded: threading.Event, began: float) -> None:
    while not loaded.is_set():
        try:
            connection, address = listener.accept()
        except OSError:
            continue
        with contextlib.suppress(OSError), connection:
            connection.settimeout(CLIENT_S)
            _handler(began)(connection, address, None)  # type: ignore[arg-type]  # it needs no server


def _handler(began: float) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seconds = round(time.monotonic() - began, 1)
            state = json.dumps({"status": "loading", "seconds": seconds}).encode()
            if self.path == "/livez":
                self._respond(200, state)
            elif self.path in ("/readyz", "/startupz", "/health"):
                self._respond(503, state)
            else:
                self._respond(503, document(503, "the model is loading; try again soon"))

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
            """Probes are not worth a line."""

    return Handler
