"""Reads JSON lines, plain or gzipped; an error names the file and the line."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from lowbit_core.errors import ConfigError, LowbitError


def read_jsonl(
    path: Path, what: str, error: type[LowbitError] = ConfigError
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a `.jsonl` or `.jsonl.gz` with the numbers of their lines; empty lines are left out.

    `what` is what errors call the file: "trace", "prompts". Raises `error`.
    """
    number = 0
    opened: Callable[..., IO[str]] = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise error(f"{what} {path}, line {number}: not a JSON object")
                    yield number, row
    except (OSError, EOFError, zlib.error) as failure:
        raise error(f"{what} {path} cannot be read: {failure}") from failure
    except UnicodeDecodeError as failure:
        raise error(f"{what} {path}, after line {number}: not UTF-8: {failure}") from failure
    except ValueError as failure:
        raise error(f"{what} {path}, line {number}: not JSON: {failure}") from failure
