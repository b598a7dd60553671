"""Rows and documents of files: JSON lines, JSON, CSV, Parquet and plain text, gzipped or not, alone or in a folder."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowbit_core.errors import RecipeError
from lowbit_core.jsonl import parse_json, read_jsonl
from lowbit_core.text_file import is_gzipped, open_bytes, open_text, quote, reading
from lowbit_quantize.quality.document import Document
from lowbit_quantize.quality.forms import FormError, as_document

DOCUMENT_CHARACTERS = 4000  # plain text is cut into documents of about this size, at blank lines
DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".jsonl", ".json", *DELIMITERS, ".parquet", ".txt")
NO_ROWS = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
)  # beside data sets' files
WHAT = "text"  # what errors call a file
LONGEST_FIELD = 2**31 - 1  # characters; csv's own limit is 131072

Row = tuple[str, Any]  # its place for errors, and what it holds


def is_readable(path: Path) -> bool:
    """Whether the name says that we read it."""
    return is_gzipped(path) or path.suffix.lower() in SUFFIXES


def read_folder(folder: Path) -> Iterator[Document]:
    """The documents of every file below a folder that we read, in the order of their paths."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and is_readable(path) and path.name not in NO_ROWS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]  # fmt: skip
    if not files:
        raise RecipeError(
            f"text folder {folder} holds no file that is read: {', '.join(SUFFIXES)}, or one of these .gz"
        )
    for path in files:
        yield from read_file(path)


def read_file(path: Path, name: str | None = None) -> Iterator[Document]:
    """The documents of a file; errors call it `name`. Raises RecipeError."""
    suffix = _suffix(path)
    if suffix == ".txt":
        yield from _paragraphs(path)
        return
    rows = {".json": _json, ".parquet": _parquet, ".csv": _table, ".tsv": _table}.get(suffix, _lines)(path)
    for place, row in rows:
        shown = place.replace(str(path), name) if name else place
        try:
            yield as_document(row, shown)
        except FormError as error:
            raise RecipeError(f"{WHAT} {shown}: {error}") from None


def _suffix(path: Path) -> str:
    return (Path(path.stem) if is_gzipped(path) else path).suffix.lower()


def _lines(path: Path) -> Iterator[Row]:
    for number, row in read_jsonl(path, WHAT, RecipeError):
        yield f"{path}, line {number}", row


def _json(path: Path) -> Iterator[Row]:
    """An array of rows, {"data": [rows]}, one row, or JSON lines."""
    with reading(path, WHAT, RecipeError), open_text(path) as file:
        text = file.read()
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _lines(path)
            return
    except (ValueError, RecursionError):
        pass
    data = parse_json(text, f"{WHAT} {path}", RecipeError)
    if isinstance(data, dict):
        data = data["data"] if isinstance(data.get("data"), list) else [data]
    if not isinstance(data, list):
        raise RecipeError(
            f'{WHAT} {path}: {quote(text[:40])} is neither an array of rows nor {{"data": [rows]}}'
        )
    for number, row in enumerate(data, 1):
        yield f"{path}, row {number}", row


def _table(path: Path) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_FIELD)
    with reading(path, WHAT, RecipeError), open_text(path, newline="") as file:
        rows = csv.DictReader(file, delimiter=DELIMITERS[_suffix(path)], strict=True)
        try:
            for row in rows:
                place = f"{path}, line {rows.line_num}"
                if None in row:
                    raise RecipeError(
                        f"{WHAT} {place}: more fields than the header's {len(rows.fieldnames or ())}"
                    )
                yield place, row
        except csv.Error as error:
            raise RecipeError(
                f"{WHAT} {path}, after line {rows.line_num}: not CSV: {error}; quote fields"
            ) from None


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise RecipeError(f"{WHAT} {path} needs the package pyarrow; run `pip install pyarrow`") from None
    number = 0
    with reading(path, WHAT, RecipeError), open_bytes(path) as file:
        try:
            for batch in parquet.ParquetFile(file).iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
        except ArrowException as error:
            raise RecipeError(f"{WHAT} {path} is not a whole Parquet file: {quote(str(error))}") from None


def _paragraphs(path: Path) -> Iterator[Document]:
    with reading(path, WHAT, RecipeError), open_text(path) as file:
        text = file.read()
    paragraphs: list[str] = []
    line = first = 1
    for paragraph in text.split("\n\n"):
        paragraphs.append(paragraph)
        line += paragraph.count("\n") + 2
        if sum(map(len, paragraphs)) >= DOCUMENT_CHARACTERS:
            yield Document("text", text="\n\n".join(paragraphs), place=f"{path}, line {first}")
            paragraphs, first = [], line
    if "".join(paragraphs).strip():
        yield Document("text", text="\n\n".join(paragraphs), place=f"{path}, line {first}")
