"""What every peer's program is given and says at the end. Runs in the peer's environment, standard library only."""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METHODS = ("awq", "gptq", "rtn", "autoround", "awq+gptq", "smoothquant+gptq", "sparsegpt")


@dataclass(frozen=True)
class Task:
    """One quantization; `settings` are the peer's own options, by the peer's own names."""

    model: str
    rows: list[list[int]]
    out: str
    method: str
    bits: int
    group_size: int
    symmetric: bool
    threads: int
    settings: dict[str, Any]
    scheme: str | None


def performed(program: Callable[[Task], None]) -> None:
    """Run `program` on the task of the command line; the last line of stdout is a JSON object."""
    parser = argparse.ArgumentParser(description="A peer's quantizer on given token ids.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--token-ids", type=Path, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--scheme", help="a preset, in place of bits and groups")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--settings", type=json.loads, default={}, help="the peer's options as JSON")
    given = parser.parse_args()
    rows = json.loads(given.token_ids.read_text(encoding="utf-8"))["input_ids"]
    task = Task(
        model=given.model,
        rows=rows,
        out=given.out,
        method=given.method,
        bits=given.bits,
        group_size=given.group_size,
        symmetric=not given.asymmetric,
        threads=given.threads,
        settings=given.settings,
        scheme=given.scheme,
    )
    started_s = time.perf_counter()
    program(task)
    seconds = round(time.perf_counter() - started_s, 1)
    print(json.dumps({"rows": len(rows), "tokens": sum(map(len, rows)), "program_s": seconds}))
