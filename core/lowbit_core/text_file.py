"""Text files as people have them: UTF-8, UTF-16 and UTF-32 by their byte order marks, gzipped or not.

A failure names the file and the line and quotes a few characters, never the file's bytes.
"""

import codecs
import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lowbit_core.errors import LowbitError

QUOTED = 80  # characters at most
HEAD_BYTES = 64
MARKS = (  # UTF-32's begin with UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class NotTextError(ValueError):
    """A file that no encoding of ours reads; says what to do."""


def is_gzipped(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() == ".gz"


def open_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked."""
    opened: Callable[..., Any] = gzip.open if is_gzipped(path) else open
    found: IO[bytes] = opened(path, "rb")
    return found


def open_text(path: Path, newline: str | None = None) -> IO[str]:
    """The file as text, without its byte order mark; raises what `reading` turns into an error."""
    head, encoding = _head(path)
    if encoding == "utf-8" and 4 * head.count(0) > len(head):
        raise NotTextError(
            "it looks like UTF-16 without a byte order mark, or no text at all; save it as UTF-8"
        )
    opened: Callable[..., IO[str]] = gzip.open if is_gzipped(path) else open
    return opened(path, "rt", encoding=encoding, newline=newline)


@contextmanager
def reading(path: Path, what: str, error: type[LowbitError]) -> Iterator[None]:
    """Turns what goes wrong while a file is read into `error`, which says `what` the file is to us."""
    try:
        yield
    except NotTextError as failure:
        raise error(f"{what} {path}: {failure}") from None
    except UnicodeError:
        raise error(f"{what} {path}, {_undecodable(path)}; save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as failure:
        reason = (failure.strerror if isinstance(failure, OSError) else None) or failure
        raise error(f"{what} {path} cannot be read: {quote(str(reason))}") from failure


def quote(text: str) -> str:
    """The beginning of a text on one line, in quotes, at most `QUOTED` characters with escapes."""
    shown = repr(text[:QUOTED])
    return (
        shown if len(text) <= QUOTED and len(shown) <= QUOTED else f"{shown[: QUOTED - 2].rstrip(chr(92))}…'"
    )


def half_character(text: str) -> str | None:
    """Half of a surrogate pair in a text, which no encoding writes and no tokenizer takes; with what surrounds it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return quote(text[max(0, error.start - 20) : error.end + 20])
    return None


def _head(path: Path) -> tuple[bytes, str]:
    with open_bytes(path) as data:
        head = data.read(HEAD_BYTES)
    return head, next((name for mark, name in MARKS if head.startswith(mark)), "utf-8")


def _undecodable(path: Path) -> str:
    """The first line that is not in the file's encoding, with a quote."""
    if (encoding := _head(path)[1]) not in ("utf-8", "utf-8-sig"):
        return f"which begins as {encoding.upper()}: a character is cut off or none"
    with open_bytes(path) as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                around = line[max(0, error.start - 20) : error.start + 20]
                return f"line {number}: not UTF-8: {quote(around.decode(errors='replace'))}"
    return "near its end: a character is cut off"
