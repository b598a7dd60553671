"""Compressed request bodies (`Content-Encoding`): inflated piece by piece, never past the limit of a plain body.

A window is at most 8 MiB, as RFC 9659 has it for HTTP; with zstd's own default one frame could ask for 128 MiB.
"""

import asyncio
import zlib
from collections.abc import Callable

from backports import zstd  # the standard library's compression.zstd, from Python 3.14 on
from starlette.types import Message, Receive, Scope

from lowbit_server.gateway.openai_errors import ApiError

PLAIN = ("", "identity")
ENCODINGS = (
    b"content-encoding",
    b"transfer-encoding",
)  # chunks, always the last of the latter, are the parser's
PIECE_BYTES = 256 << 10  # inflated at once, between two looks at other connections
WINDOW: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 23}


class _Gzip:
    """zlib's decompressor with the interface that the standard library's newer ones have."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        self.needs_input = True

    def decompress(self, data: bytes, max_length: int) -> bytes:
        found = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self.needs_input = not self._inner.unconsumed_tail and len(found) < max_length
        return found

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data


Decompressor = _Gzip | zstd.ZstdDecompressor
DECOMPRESSORS: dict[str, Callable[[], Decompressor]] = {
    "gzip": _Gzip,
    "x-gzip": _Gzip,
    "zstd": lambda: zstd.ZstdDecompressor(options=WINDOW),
}


def encoding_of(scope: Scope) -> str:
    """The encoding, in small letters, of a body whose chunks have been put together: of its content or its transfer."""
    named = [value for name, value in scope["headers"] if name in ENCODINGS]
    codings = b",".join(named).decode("latin-1").lower().split(",") if named else []
    return ", ".join(one for one in map(str.strip, codings) if one not in ("", "chunked"))


class Inflating:
    """An ASGI `receive` that gives the plain body: of at most `most` bytes, from at most as many compressed ones.

    Raises ApiError 415 for another encoding, 413 for a larger body and 400 for one that does not decode.
    """

    def __init__(self, encoding: str, receive: Receive, most: int) -> None:
        self._encoding, self._receive, self._most = encoding, receive, most
        self._decompressor: Decompressor | None = None  # none between two members of a body
        self._input, self._compressed, self._plain = b"", 0, 0
        self._arrived = self._done = False

    async def __call__(self) -> Message:
        if self._done:
            return await self._receive()
        while not self._input and (self._decompressor is None or self._decompressor.needs_input):
            if self._arrived:
                return self._end()
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            self._arrived, self._input = not message.get("more_body", False), message.get("body", b"")
            self._compressed += len(self._input)
            self._refuse_above(self._compressed)
        piece = self._inflate()
        self._plain += len(piece)
        self._refuse_above(self._plain)
        await asyncio.sleep(0)
        return {"type": "http.request", "body": piece, "more_body": True}

    def _inflate(self) -> bytes:
        try:
            if self._decompressor is None:
                self._decompressor = self._new()
            piece = self._decompressor.decompress(self._input, PIECE_BYTES)
        except (zlib.error, zstd.ZstdError) as error:
            raise ApiError(400, f"the body is not {self._encoding}: {error}", "content_encoding") from None
        self._input = b""
        if self._decompressor.eof:
            self._input, self._decompressor = self._decompressor.unused_data, None
        return piece

    def _new(self) -> Decompressor:
        make = DECOMPRESSORS.get(self._encoding)
        if make is None:
            message = f"the content encoding is {self._encoding[:64]!r}; send gzip, zstd or none"
            raise ApiError(415, message, "content_encoding", headers={"accept-encoding": "gzip, zstd"})
        return make()

    def _end(self) -> Message:
        if self._decompressor is not None:
            raise ApiError(400, f"the {self._encoding} body is cut short", "content_encoding")
        self._done = True
        return {"type": "http.request", "body": b"", "more_body": False}

    def _refuse_above(self, size: int) -> None:
        if size > self._most:
            raise ApiError(413, f"the request body is larger than {self._most} bytes", "body_size")
