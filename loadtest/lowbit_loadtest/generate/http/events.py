"""Server-sent events out of bytes, as they arrive: each as soon as its data is whole.

Lines end at LF, CRLF or CR, as the standard says, and nowhere else: `str.splitlines` also splits at U+2028 and its kin,
which may stand unescaped inside the JSON of an event. An object on one line of data is an event at once, because some
servers leave out the empty line that ends it. A body that begins as JSON is no stream; it is kept whole.
"""

import json
from typing import Any, NamedTuple

MOST_EVENT_BYTES = 4 << 20
MOST_WHOLE_BYTES = 64 << 20
BOM = b"\xef\xbb\xbf"
SHOWN_BYTES = 400
_decode = json.JSONDecoder().decode


class Event(NamedTuple):
    """`value` is its JSON object, None if it has none. `name` is the event's, "message" if it gives none."""

    text: str
    value: dict[str, Any] | None
    name: str = ""

    @property
    def is_done(self) -> bool:
        return self.value is None and self.text == "[DONE]"


class OversizedEvent(Exception):
    """More bytes than any event has."""


class EventReader:
    """Bytes in, events out. After the end, `whole` has a body that is JSON, `head` the beginning of any body."""

    def __init__(self) -> None:
        self.head = b""
        self.whole: bytearray | None = None
        self._started = False
        self._pending = b""
        self._after_cr = False
        self._data: list[str] = []
        self._name = ""

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that these bytes complete. OversizedEvent."""
        if self._started and not self._pending and not self._data and chunk[:7] == b"data: {":
            if chunk[-3:] == b"}\n\n" and chunk.count(b"\n") == 2:  # most chunks of most servers
                text = chunk[6:-2].decode("utf-8", errors="replace")
                if (value := _object(text)) is not None:
                    event = Event(text, value, self._name)
                    self._name, self._after_cr = "", False
                    return [event]
        elif not self._started:
            chunk = self._start(chunk)
        if self.whole is not None:
            self.whole += chunk
            if len(self.whole) > MOST_WHOLE_BYTES:
                raise OversizedEvent
            return []
        return [found for line in self._lines(chunk) if (found := self._line(line)) is not None]

    def end(self) -> list[Event]:
        """The last line, where the body ended with it and not with the empty line that should follow."""
        line, self._pending = self._pending, b""
        event = self._line(line) if line else None
        return [event] if event is not None else []

    def _start(self, chunk: bytes) -> bytes:
        """Find out what the body is; bytes that do not tell yet are kept."""
        self.head += chunk
        body = self.head.removeprefix(BOM).lstrip(b"\r\n\t ")
        if not body or (len(self.head) < len(BOM) and BOM.startswith(self.head)):
            return b""
        self._started = True
        if body[:1] in b"{[":
            self.whole = bytearray()
        self.head = self.head[:SHOWN_BYTES]
        return body

    def _lines(self, chunk: bytes) -> list[bytes]:
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        if chunk:
            self._after_cr = False
        if b"\r" in chunk:
            self._after_cr = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._pending = (self._pending + chunk).split(b"\n")
        if len(self._pending) > MOST_EVENT_BYTES:
            raise OversizedEvent
        return lines

    def _line(self, line: bytes) -> Event | None:
        if not line:
            return self._empty_line()
        name, _, value = line.partition(b":")
        text = value.removeprefix(b" ").decode("utf-8", errors="replace")
        if name == b"data":
            return self._add(text)
        if name == b"event":
            self._name = text.strip()
        elif name == b"error":  # llama.cpp
            return Event(text, _object(text), "error")
        return None

    def _add(self, text: str) -> Event | None:
        if not self._data:
            if (value := _object(text)) is not None:
                return Event(text, value, self._name)
            if text.strip() == "[DONE]":
                return Event("[DONE]", None, self._name)
        self._data.append(text)
        return None

    def _empty_line(self) -> Event | None:
        data, name = "\n".join(self._data), self._name
        self._data, self._name = [], ""
        return Event(data, _object(data), name) if data.strip() else None


def _object(text: str) -> dict[str, Any] | None:
    if text[:1] != "{":
        return None
    try:
        value: dict[str, Any] = _decode(text)
    except (ValueError, RecursionError):
        return None
    return value
