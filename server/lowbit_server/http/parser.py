"""uvicorn's HTTP/1.1 protocol with bounds on all that arrives: how large, and how long it may take.

llhttp, the parser, refuses what could smuggle a request past a proxy: two lengths, a length together with chunks, a
space before a colon, folded headers (tests/server/http/test_odd_clients.py). It has no limits of its own, and
uvicorn none on how long a head, a body or a client that reads nothing may take. Nothing here runs for a piece of a
response; how a connection ends is in `endings.py`.

An offer to go on in another protocol (`Upgrade: h2c`, which Java's HttpClient and `curl --http2` make) is declined, as
HTTP allows: the request is answered in HTTP/1.1. httptools drops the body of such a request, so its head is parsed
again without the offer.
"""

import httptools

from lowbit_server.http.endings import DEFAULT_TIMES, EndingHttp, Times

FRAMING_FACTOR = 8  # bytes that chunks of one byte take, and then some
OFFER = (b"upgrade", b"http2-settings")


class BoundedHttp(EndingHttp):
    """One connection."""

    max_header_bytes = 64 << 10
    _framed_bytes = _body_bytes = 0

    def data_received(self, data: bytes) -> None:
        if self.ending:
            return
        self._unset_keepalive_if_required()
        if self.in_head:
            self.head_bytes += len(data)
        else:
            self._framed_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._decline(data[offer.args[0] :])
        except httptools.HttpParserError:
            self.refuse(400, "these bytes are no HTTP request")
        else:
            self._check_bounds()

    def _check_bounds(self) -> None:
        if self.in_head:
            if self.head_bytes > self.max_header_bytes:
                self._refuse_large_head()
            elif self.head_bytes and self.deadline is None:
                self.set_deadline(self.times.head_s)
        elif self._framed_bytes > self.max_header_bytes + FRAMING_FACTOR * self._body_bytes:
            self.refuse(431, f"what frames the body is larger than {self.max_header_bytes} bytes")
        elif self.deadline is None:
            self.set_deadline(self.times.body_s)

    def _refuse_large_head(self) -> None:
        self.refuse(431, f"the request head is larger than {self.max_header_bytes} bytes")

    def _decline(self, rest: bytes) -> None:
        head = [self.parser.get_method(), b" ", self.url, b" HTTP/1.1\r\n"]
        for name, value in self.headers:
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                value = b", ".join(option for option in options if option.lower() not in OFFER)
            if name not in OFFER:
                head += [name, b": ", value, b"\r\n"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.head_bytes = 0
        self.data_received(b"".join([*head, b"\r\n", rest]))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.in_head:  # a trailer is no header
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.ending or (self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"):
            return  # `_decline` parses it again
        if self.head_bytes > self.max_header_bytes and self._head_size() > self.max_header_bytes:
            self._refuse_large_head()
            return
        if sum(name == b"host" for name, _ in self.headers) > 1:
            self.refuse(400, "the request names two hosts")
            return
        super().on_headers_complete()
        self.in_head = False
        self.head_bytes = self._framed_bytes = self._body_bytes = 0
        self.set_deadline(None)
        self.request_begun(self.cycle)

    def _head_size(self) -> int:
        """Without what came after it in the same piece."""
        return len(self.url) + sum(len(name) + len(value) + len(b": \r\n") for name, value in self.headers)

    def on_body(self, body: bytes) -> None:
        if self.in_head:  # of a head that was refused
            return
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.in_head:  # of a head that is parsed again
            return
        self.in_head = True
        super().on_message_complete()
        self.request_arrived(self.cycle)


def bounded_http(max_header_bytes: int, times: Times = DEFAULT_TIMES) -> type[BoundedHttp]:
    """The protocol class with these limits, as uvicorn's configuration takes it."""
    return type("BoundedHttp", (BoundedHttp,), {"max_header_bytes": max_header_bytes, "times": times})
