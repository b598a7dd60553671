"""Reads JSON lines, plain or gzipped; an error names the file and the line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowbit_core.errors import ConfigError, LowbitError
from lowbit_core.text_file import half_character, open_text, quote, reading


def read_jsonl(
    path: Path, what: str, error: type[LowbitError] = ConfigError
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a `.jsonl` or `.jsonl.gz` with the numbers of their lines; empty lines are left out.

    `what` is what errors call the file: "trace", "prompts". Raises `error`.
    """
    with reading(path, what, error), open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{what} {path}, line {number}"
            row = parse_json(line, place, error)
            if not isinstance(row, dict):
                hint = "; an array of rows belongs into a .json" if isinstance(row, list) else ""
                raise error(f"{place}: not a JSON object: {quote(line.strip())}{hint}")
            yield number, row


def parse_json(text: str, place: str, error: type[LowbitError]) -> Any:
    """A JSON text; raises `error` where it is none, is nested too deeply or holds half a character."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as failure:
        around = quote(text[max(0, failure.pos - 20) : failure.pos + 40].strip())
        raise error(f"{place}: not JSON: {failure.msg} (character {failure.pos + 1}): {around}") from None
    except ValueError as failure:  # a whole number of thousands of digits
        raise error(f"{place}: not JSON that can be read: {quote(str(failure))}") from None
    except RecursionError:
        raise error(f"{place}: nested too deeply: {quote(text[:40])}") from None
    if "\\ud" in text.lower() and (half := half_character(json.dumps(data, ensure_ascii=False))):
        raise error(
            f"{place}: half of a surrogate pair in {half}; write the whole character, or leave it out"
        )
    return data
