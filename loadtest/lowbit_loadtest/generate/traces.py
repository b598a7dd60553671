"""Reads recorded traces: when each request came, how long it was, and what it shares with others.

Azure's LLM inference traces (CSV: TIMESTAMP, ContextTokens, GeneratedTokens; Patel et al., Splitwise, 2023,
arXiv 2311.18677) and Mooncake's (JSONL: timestamp in ms, input_length, output_length, hash_ids of 512-token blocks;
Qin et al., 2024, arXiv 2407.00079).
"""

import csv
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from lowbit_core.errors import ConfigError
from lowbit_core.jsonl import read_jsonl
from lowbit_loadtest.scenario import Replay

MOONCAKE_BLOCK_TOKENS = 512


@dataclass(frozen=True)
class TraceRow:
    """One recorded request; `at_s` counts from the trace's first request that is played."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()  # equal leading ids mean an equal prefix


@dataclass(frozen=True)
class Trace:
    rows: tuple[TraceRow, ...]
    cut_to_limits: int


def read_trace(replay: Replay) -> Trace:
    """The rows that a replay plays, in order of time; raises ConfigError naming file and line."""
    path = Path(replay.path)
    readers = {".csv": _azure, ".jsonl": _mooncake}
    if path.suffix not in readers:
        raise ConfigError(f"trace {path}: give Azure's .csv or Mooncake's .jsonl")
    rows = sorted(readers[path.suffix](path), key=lambda row: row.at_s)
    first_s = rows[0].at_s + replay.skip_s if rows else 0.0
    played = [row for row in rows if row.at_s >= first_s]
    if not played:
        raise ConfigError(f"trace {path} has no request after skip_s = {replay.skip_s:g}")
    start_s = played[0].at_s
    limited = [_within_limits(row, replay) for row in played]
    cut = sum(before != after for before, after in zip(played, limited, strict=True))
    timed = tuple(replace(row, at_s=(row.at_s - start_s) / replay.speed) for row in limited)
    return Trace(timed, cut)


def _within_limits(row: TraceRow, replay: Replay) -> TraceRow:
    prompt = min(row.prompt_tokens, replay.max_prompt_tokens or row.prompt_tokens)
    output = min(row.output_tokens, replay.max_output_tokens or row.output_tokens)
    return replace(row, prompt_tokens=prompt, output_tokens=output)


def _azure(path: Path) -> list[TraceRow]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace {path} cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(csv.DictReader(text.splitlines()), 2):
        try:
            rows.append(
                TraceRow(
                    _azure_time_s(line["TIMESTAMP"]),
                    max(1, int(line["ContextTokens"])),
                    max(1, int(line["GeneratedTokens"])),
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"trace {path}, line {number}: not TIMESTAMP,ContextTokens,GeneratedTokens: {error}"
            ) from error
    return rows


def _azure_time_s(text: str) -> float:
    """`2023-11-16 18:17:03.9799600`: seven digits of a second, one more than datetime reads."""
    whole, _, fraction = text.strip().partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction.rstrip('Z') or 0}")


def _mooncake(path: Path) -> list[TraceRow]:
    rows = []
    for number, row in read_jsonl(path, "trace"):
        try:
            rows.append(
                TraceRow(
                    float(row["timestamp"]) / 1000,
                    max(1, int(row["input_length"])),
                    max(1, int(row["output_length"])),
                    tuple(int(block) for block in row.get("hash_ids", ())),
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"trace {path}, line {number}: not timestamp, input_length, output_length: {error}"
            ) from error
    return rows
