"""Reads a recording: tables (CSV with a header) and JSON (an object a line, or an array), the format by its keys.

Byte order marks, UTF-16, CRLF and gzip are read as they come. An error names the file, the line and the column or key.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowbit_core.errors import ConfigError
from lowbit_core.jsonl import parse_json, read_jsonl
from lowbit_core.text_file import open_text, quote, reading
from lowbit_loadtest.generate.traces import azure, bailian, burstgpt, mooncake, own, sharegpt
from lowbit_loadtest.generate.traces.recorded import Format, RecordedSession, Row
from lowbit_loadtest.sections.distributions import TraceFormat

# The first whose keys are all there: Bailian's are Mooncake's and more. Messages are ours unless openai is asked for.
FORMATS = (
    azure.FORMAT, burstgpt.FORMAT, bailian.FORMAT, mooncake.FORMAT, sharegpt.FORMAT,
    own.LENGTHS, own.PROMPTS, own.TURNS, own.MESSAGES, own.OPENAI,
)  # fmt: skip
DELIMITERS = (",", ";", "\t")  # spreadsheets write what their language is used to
SNIFFED = 4096  # characters


def read_recording(
    path: Path, what: str, wanted: TraceFormat | None = None
) -> tuple[str, list[RecordedSession]]:
    """The format's name and all sessions in order of the file; `what` is what errors call the file."""
    rows = _rows(path, what)
    first = next(rows, None)
    if first is None:
        raise ConfigError(f'{what} {path} has no line; write one object a line, such as {{"prompt": "…"}}')
    found = _format(first, f"{what} {path}", wanted)
    sessions = [found.session(first), *(found.session(row) for row in rows)]
    return found.name, sessions


def _format(first: Row, place: str, wanted: str | None) -> Format:
    keys = {key.casefold() for key in first.values}
    for one in FORMATS:
        if wanted in (None, one.name) and keys.issuperset(key.casefold() for key in one.keys):
            return one
    forms = [one for one in FORMATS if wanted in (None, one.name)]
    known = "; ".join(f"{one.name} ({', '.join(one.keys)})" for one in forms)
    said = f"is not what {wanted} has" if wanted else "is no format that is known"
    raise ConfigError(
        f"{place} {said}: its first {first.field}s are {quote(', '.join(map(str, first.values)))}; known by: {known}"
    )


def _rows(path: Path, what: str) -> Iterator[Row]:
    """Rows of a table or of JSON, told apart by the first character that is no space."""
    with reading(path, what, ConfigError), open_text(path) as text:
        head = text.read(SNIFFED).lstrip()
    if head.startswith("["):
        return _array(path, what)
    if head.startswith("{") or not head:
        return (Row(f"{what} {path}, line {number}", row) for number, row in read_jsonl(path, what))
    return _table(path, what)


def _array(path: Path, what: str) -> Iterator[Row]:
    with reading(path, what, ConfigError), open_text(path) as text:
        items: Any = parse_json(text.read(), f"{what} {path}", ConfigError)
    for number, item in enumerate(items, 1):
        place = f"{what} {path}, item {number}"
        if not isinstance(item, dict):
            raise ConfigError(f"{place}: not an object: {quote(str(item))}")
        yield Row(place, item)


def _table(path: Path, what: str) -> Iterator[Row]:
    with reading(path, what, ConfigError), open_text(path, newline="") as text:
        before, first = 0, text.readline()
        while first and not first.strip():
            before, first = before + 1, text.readline()
        delimiter = max(DELIMITERS, key=first.count)
        header = [name.strip().casefold() for name in next(csv.reader([first], delimiter=delimiter))]
        lines = csv.reader(text, delimiter=delimiter)
        try:
            for cells in lines:
                if not any(cell.strip() for cell in cells):
                    continue
                place = f"{what} {path}, line {before + 1 + lines.line_num}"
                if len(cells) != len(header):
                    raise ConfigError(f"{place}: {len(cells)} columns, where the header has {len(header)}")
                yield Row(place, dict(zip(header, cells, strict=True)), "column")
        except csv.Error as failure:
            place = f"{what} {path}, line {before + 1 + lines.line_num}"
            raise ConfigError(f"{place}: no CSV: {failure}") from None
