"""A result's file, whoever wrote it: JSON, or JSON a line; the reader is known by what is in it, not by its name."""

import json
from pathlib import Path
from typing import Any, Protocol

from lowbit_core.errors import ConfigError
from lowbit_loadtest.compare.readers import aiperf, guidellm, lowbit, vllm_bench
from lowbit_loadtest.compare.side import Side


class Reader(Protocol):
    """A module of `readers/`: whether it knows a document, and what is in it."""

    def reads(self, document: Any) -> bool: ...
    def read(self, document: Any, name: str) -> Side: ...


OTHERS: tuple[Reader, ...] = (aiperf, guidellm, vllm_bench)
READABLE = (
    "a result of lowbit loadtest --json, AIPerf (profile_export.jsonl, profile_export_aiperf.json), "
    "GuideLLM (benchmarks.json) or vllm bench serve (--save-result)"
)


def read_result(path: Path, allow_invalid: bool = False) -> Side:
    """Read one side of a comparison; ConfigError for what no reader knows, or what is not whole."""
    document = _parsed(path)
    try:
        if lowbit.reads(document):
            return lowbit.read(document, path.name, allow_invalid)
        for reader in OTHERS:
            if reader.reads(document):
                return reader.read(document, path.name)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} looks like a result, but is not whole: {error!r}") from error
    raise ConfigError(f"{path} is not {READABLE}")


def _parsed(path: Path) -> Any:
    """One JSON value, or the list of those on the lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    try:
        return json.loads(text)
    except ValueError as error:
        lines = [line for line in text.splitlines() if line.strip()]
        try:
            return [json.loads(line) for line in lines] if len(lines) > 1 else _refuse(path, error)
        except ValueError as of_line:
            return _refuse(path, of_line)


def _refuse(path: Path, error: ValueError) -> Any:
    raise ConfigError(f"{path} cannot be read: {error}")
