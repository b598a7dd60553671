"""The result for spreadsheets: a summary row for each rate, and a row for each request.

Both are made of the JSON document, so that a column has the name of its key there (`ttft_s.p95`). Numbers that are not
known are empty cells. Free text, such as a server's messages, and lists stay in the JSON.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Document = dict[str, Any]
FREE_TEXT = (
    "details",
    "contradictions",
    "finish_reasons",
    "request_table",
)  # keys that are not ours, and the requests


def requests_file(summary: Path) -> Path:
    """Where the requests stand: `a.requests.csv` beside `a.csv`."""
    return summary.with_suffix(f".requests{summary.suffix}")


def write_csv(document: Document, summary: Path) -> None:
    """Write both tables; the document needs its requests."""
    summary.write_text(summary_csv(document), encoding="utf-8", newline="")
    requests_file(summary).write_text(requests_csv(document), encoding="utf-8", newline="")


def summary_csv(document: Document) -> str:
    """A row for each rate; columns are what any of the rates has."""
    rows = [dict(_flat(point)) for point in document["points"]]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return _csv(columns, [[row.get(name) for name in columns] for row in rows])


def requests_csv(document: Document) -> str:
    """A row for each request of every rate."""
    points = document["points"]
    columns = points[0]["request_table"]["columns"] if points else []
    rows = [[point["offered_rps"], *row] for point in points for row in point["request_table"]["rows"]]
    return _csv(["offered_rps", *columns], rows)


def _flat(value: Document, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers, flags and None of a nested object by their path."""
    for key, one in value.items():
        if key in FREE_TEXT:
            continue
        if isinstance(one, dict):
            yield from _flat(one, f"{prefix}{key}.")
        elif not isinstance(one, list | tuple | str):
            yield f"{prefix}{key}", one


def _csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
