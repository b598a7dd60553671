"""What the endpoint itself costs, an older revision against the working tree, in turns of seconds.

    python benchmarks/server_overhead/revisions.py OLD_REVISION --work DIR --out RESULT.json
    python benchmarks/server_overhead/revisions.py OLD_REVISION --checkpoint DIR --work DIR --out RESULT.json
    python benchmarks/server_overhead/revisions.py OLD_REVISION … --everything

Both servers are up, with every limit on and 1,000 keys, and are asked in turn; the order rotates. Without a checkpoint
benchmarks/mock_engine.py is the engine of both: then `first` is what a request takes to the engine and `between` what a
piece takes from the engine to its client, read off the stream, client and kernel included. With a checkpoint they are
the time to the first token and between tokens, as the client sees them. `cpu` is CPU time of the API's process, by
token, as the kernel counts it. All in microseconds, and as ratios new / old with standard errors (bootstrap over
rounds). With `--everything` the new one also counts tokens by month into a file, with quotas, tells joules and a cost,
and has a thousandth of its answers scored again by the old one as its base, when it is idle.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.endpoint import write_result  # noqa: E402
from benchmarks.mock_engine import folder  # noqa: E402
from benchmarks.revisions.trees import Tree, two_trees  # noqa: E402
from benchmarks.server_overhead.run import LIMITS, MODEL, key_file  # noqa: E402

from lowbit_core.server_process import ServerProcess, free_port, running_server  # noqa: E402

STREAMS = (1, 32, 256)
QUESTIONS = {1: 4, 32: 2, 256: 1}  # of each stream and turn
TIMES = re.compile(rb'"created":(\d+),"received":(\d+)')
TOKEN = b'"content":"'


@dataclass(frozen=True)
class Turn:
    """One server, loaded once. Microseconds: `first` to the engine or the first token, `between` of pieces."""

    cpu_us: float
    first_us: list[float]
    between_us: list[float]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--streams", type=int, nargs="+", choices=STREAMS, default=list(STREAMS))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=60.0, help="no round begins later than this")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--everything", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    keys, key = key_file(arguments.work)
    trees = two_trees(arguments.old, arguments.work)
    cells: dict[tuple[str, int], list[Turn]] = {}
    with ExitStack() as stack:
        servers: dict[str, ServerProcess] = {}
        for tree in trees:
            flags = ["--api-keys", str(keys)]
            if arguments.everything and tree.name == "new":
                flags = everything(arguments.work, key, servers["old"].url)
            server = started(tree, arguments.checkpoint, arguments.work, flags)
            servers[tree.name] = stack.enter_context(server)
        ends = time.monotonic() + 60 * arguments.minutes
        for number in range(-1, arguments.rounds):  # one round to warm up
            if time.monotonic() > ends and cells:
                break
            for streams in arguments.streams:
                for name in (("old", "new"), ("new", "old"))[number % 2]:
                    found = turn(servers[name], streams, arguments, key)
                    if number >= 0:
                        cells.setdefault((name, streams), []).append(found)
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    rows = [row(cells, streams) for streams in arguments.streams]
    result = {
        "old": trees[0].revision, "engine": arguments.checkpoint.name if arguments.checkpoint else "mock",
        "everything": arguments.everything, "tokens": arguments.tokens,
        "rounds": len(next(iter(cells.values()))), "questions": QUESTIONS, "rows": rows,
        "cpu_us": {f"{name}, {streams}": [one.cpu_us for one in turns] for (name, streams), turns in cells.items()},
    }  # fmt: skip
    write_result(arguments.out, result)
    for one in rows:
        print(json.dumps(one))
    return 0


def everything(work: Path, key: str, base: str) -> list[str]:
    """The flags of all that is watched in production; the keys are those of the other server, with quotas."""
    document = yaml.safe_load((work / "keys.yaml").read_text())
    for entry in document["keys"]:
        entry["tokens_per_month"] = 10**12
    (work / "quotas.yaml").write_text(yaml.safe_dump(document))
    (work / "key").write_text(key)
    return [
        "--api-keys", str(work / "quotas.yaml"), "--usage-file", str(work / "usage.db"), "--price-per-hour", "2.4",
        "--shadow", base, "--shadow-share", "0.001", "--shadow-key-file", str(work / "key"),
    ]  # fmt: skip


def started(tree: Tree, checkpoint: Path | None, work: Path, more: Sequence[str]) -> Any:
    """`lowbit serve` of a tree, or its mock, until the block ends."""
    port = free_port()
    flags = ["--port", str(port), "--served-model-name", MODEL, *LIMITS, *more]
    if checkpoint is None:
        program = [sys.executable, str(ROOT / "benchmarks" / "mock_engine.py")]
        command = [*program, "serve", str(folder(work / "mock")), *flags]
    else:
        eager = ("--enforce-eager", "--kv-cache-gib", "1", "--max-num-seqs", "256")
        command = tree.command("serve", str(checkpoint), *flags, *eager)
    log = work / f"{tree.name}.log"
    return running_server(command, f"http://127.0.0.1:{port}", log, environment=tree.environment)


def turn(server: ServerProcess, streams: int, arguments: argparse.Namespace, key: str) -> Turn:
    """Every stream asks its questions one after the other."""
    before = cpu_s(server.process.pid)
    port = int(server.url.rpartition(":")[2])
    found = uvloop.run(ask(port, streams, arguments.tokens, key, arguments.checkpoint is None))
    spent_s = cpu_s(server.process.pid) - before
    first = [one for answer in found for one in answer[0]]
    between = [one for answer in found for one in answer[1]]
    cpu_us = spent_s * 1e6 / (streams * QUESTIONS[streams] * arguments.tokens)
    return Turn(round(cpu_us, 2), first, between)


def cpu_s(pid: int) -> float:
    """Of one process, without its children; the kernel's count in nanoseconds."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


async def ask(
    port: int, streams: int, tokens: int, key: str, mock: bool
) -> list[tuple[list[float], list[float]]]:
    async def client(number: int) -> list[tuple[list[float], list[float]]]:
        await asyncio.sleep(number * 0.03 / streams)
        return [await answer(port, tokens, key, mock) for _ in range(QUESTIONS[streams])]

    return [one for found in await asyncio.gather(*map(client, range(streams))) for one in found]


async def answer(port: int, tokens: int, key: str, mock: bool) -> tuple[list[float], list[float]]:
    """Microseconds to the engine or the first token, and of each piece; SystemExit where the answer is not whole."""
    words = " ".join(str(random.randrange(1000)) for _ in range(16))
    document = {
        "model": MODEL, "messages": [{"role": "user", "content": words}], "max_tokens": tokens, "ignore_eos": True,
        "stream": True, "temperature": 0,
    }  # fmt: skip
    body = json.dumps(document).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began = time.monotonic_ns()
    writer.write(head.encode() + body)
    first: list[float] = []
    pieces: list[float] = []
    last, tail = began, b""
    with contextlib.closing(writer):
        while part := await reader.read(65536):
            now = time.monotonic_ns()
            if mock:
                for created, received in TIMES.findall(part):
                    first = first or [(int(received) - began) / 1e3]
                    pieces.append((now - int(created)) / 1e3)
            elif TOKEN in part:
                if first:
                    pieces.append((now - last) / 1e3)
                else:
                    first = [(now - began) / 1e3]
                last = now
            tail = (tail + part)[-64:]
    if b"[DONE]" not in tail:
        raise SystemExit(f"an answer was cut: {tail!r}")
    return first, pieces


def _quantile(name: str, share: float) -> Callable[[Sequence[Turn]], float]:
    return lambda turns: float(np.quantile(np.concatenate([getattr(one, name) for one in turns]), share))


FIGURES: dict[str, Callable[[Sequence[Turn]], float]] = {
    "cpu": lambda turns: statistics.median(one.cpu_us for one in turns),
    "first_p50": _quantile("first_us", 0.5),
    "first_p99": _quantile("first_us", 0.99),
    "between_p50": _quantile("between_us", 0.5),
    "between_p99": _quantile("between_us", 0.99),
}


def row(cells: dict[tuple[str, int], list[Turn]], streams: int) -> dict[str, Any]:
    """Microseconds of both, and new / old."""
    old, new = cells["old", streams], cells["new", streams]
    found: dict[str, Any] = {"streams": streams}
    for name, of in FIGURES.items():
        generator = random.Random(0)
        draws = []
        for _ in range(200):
            rounds = generator.choices(range(len(old)), k=len(old))
            draws.append(of([new[one] for one in rounds]) / of([old[one] for one in rounds]))
        found[name] = {
            "old_us": round(of(old), 1), "new_us": round(of(new), 1), "ratio": round(of(new) / of(old), 4),
            "standard_error": round(statistics.pstdev(draws), 4),
        }  # fmt: skip
    return found


if __name__ == "__main__":
    sys.exit(main())
