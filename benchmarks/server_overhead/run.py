"""What the gateway costs: `lowbit serve` with all limits on and 1,000 keys, against bare vLLM, in turns.

    python benchmarks/server_overhead/run.py CHECKPOINT --work DIR --out benchmarks/server_overhead/results/NAME.json

Three servers on the same checkpoint with the same engine arguments: `lowbit`, `bare` and `bare again`, the last as the
noise floor. All are up, one is loaded at a time. A round gives each of them the same few questions at each number of
streams, in an order that rotates: a turn takes seconds, so that a machine whose speed drifts does not favour one.
Compared are output tokens/s over all turns, the median time to first token of all answers, and the CPU time of the
API's process: ratios to `bare`, with standard errors (bootstrap over rounds). After a set of rounds all three are
started anew, in another order, because where a process happens to lie in memory stays with it.

vLLM's engine spins while its worker computes. Where the kernel puts it decides more than any gateway does, so with two
cores or more the workers keep the first, and everything else, the clients too, the second.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.endpoint import LOWBIT, PYTHON, lowbit_serve, pinned, running, write_result  # noqa: E402
from benchmarks.http_load import Answer, post  # noqa: E402

from lowbit_core.server_process import ServerProcess  # noqa: E402

MODEL = "smollm2"
KEYS = 1000
QUESTIONS = {1: 2, 8: 1, 32: 1}  # of each stream and turn, by the number of streams
BETWEEN_STREAMS_S = 0.03  # all at once, how the first prompts fall into batches would be a matter of luck
KV_BYTES = 1 << 30
BARE = "vllm.entrypoints.launchers.api_server.entry"
LIMITS = (
    "--request-timeout-s", "600", "--max-output-tokens", "1024", "--max-num-queued-reqs", "256",
    "--max-num-queued-tokens", "100000", "--max-prompt-characters", "20000",
)  # fmt: skip
Cells = dict[tuple[str, int], list["Turn"]]


@dataclass(frozen=True)
class Turn:
    """One server, loaded once. `cpu_s` is of the API's process, without its engine."""

    tokens: int
    seconds: float
    cpu_s: float
    first_token_s: list[float]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--streams", type=int, nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--sets", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=11, help="of each set")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_INT4_W4A8": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }  # as Lowbit's
    keys, key = key_file(arguments.work)
    limits = ("--served-model-name", MODEL, "--api-keys", str(keys), *LIMITS, "--max-num-seqs", "64")
    cells: Cells = {}
    names = ("lowbit", "bare", "bare again")
    for number in range(arguments.sets):
        with ExitStack() as stack:
            servers = {}
            for name in names[number % 3 :] + names[: number % 3]:
                log = arguments.work / f"{name}.log"
                if name == "lowbit":
                    started = lowbit_serve(arguments.checkpoint, log, *limits)
                else:
                    started = running(bare(arguments.checkpoint), log, "/health")
                servers[name] = stack.enter_context(started)
            with pinned(servers.values()):
                ordered = {name: servers[name] for name in names}
                measure(ordered, arguments, key, cells, number * arguments.rounds)
    rows = [row(cells, streams) for streams in arguments.streams]
    result = {
        "keys": KEYS, "sets": arguments.sets, "rounds": arguments.rounds, "questions": QUESTIONS,
        "tokens": arguments.tokens, "limits": limits[4:], "rows": rows,
        "turns": {f"{name}, {streams}": [asdict(turn) for turn in turns] for (name, streams), turns in cells.items()},
    }  # fmt: skip
    write_result(arguments.out, result)
    for one in rows:
        print(json.dumps(one))
    return 0


def key_file(work: Path) -> tuple[Path, str]:
    """1,000 keys, each with every limit and none of them reached; the last one is used."""
    made = subprocess.run([LOWBIT, "key", "used"], capture_output=True, text=True, check=True).stdout
    limits = {
        "requests_per_minute": 10**6, "tokens_per_minute": 10**9, "concurrent_requests": 1000, "models": [MODEL],
    }  # fmt: skip
    used = yaml.safe_load(made)["keys"][0]
    others = [{"name": f"key-{number}", "sha256": f"{number:064x}"} for number in range(KEYS - 1)]
    path = work / "keys.yaml"
    path.write_text(yaml.safe_dump({"keys": [entry | limits for entry in [*others, used]]}))
    return path, made.splitlines()[0].removeprefix("# ")


def bare(checkpoint: Path) -> list[str]:
    """vLLM's own server with the engine arguments that `lowbit serve` derives."""
    return [
        str(PYTHON), "-m", BARE, "--model", str(checkpoint), "--served-model-name", MODEL, "--enforce-eager",
        "--kv-cache-memory-bytes", str(KV_BYTES), "--dtype", "bfloat16", "--max-num-seqs", "64",
        "--load-format", "safetensors", "--uvicorn-log-level", "warning", "--disable-uvicorn-access-log",
        "--host", "127.0.0.1",
    ]  # fmt: skip


def measure(
    servers: dict[str, ServerProcess], arguments: argparse.Namespace, key: str, cells: Cells, done: int
) -> None:
    """One set of rounds; `done` rounds were before it."""
    names = list(servers)
    for name in names:  # warm up
        turn(servers[name], 8, "warm up", arguments.tokens, key)
    for number in range(done, done + arguments.rounds):
        for streams in arguments.streams:
            for name in names[number % len(names) :] + names[: number % len(names)]:
                found = turn(servers[name], streams, str(number), arguments.tokens, key)
                cells.setdefault((name, streams), []).append(found)
        print(f"round {number + 1} of {arguments.sets * arguments.rounds}", file=sys.stderr)


def turn(server: ServerProcess, streams: int, seed: str, tokens: int, key: str) -> Turn:
    """Every stream asks its questions one after the other; timed until the last has its last answer."""
    api = psutil.Process(server.process.pid)
    before, began = sum(api.cpu_times()[:2]), time.monotonic()
    answers = asyncio.run(ask(f"{server.url}/v1/chat/completions", streams, seed, tokens, key))
    seconds, cpu_s = time.monotonic() - began, sum(api.cpu_times()[:2]) - before
    if not all(answer.status == 200 and answer.done for answer in answers):
        raise SystemExit(f"{server.url}: not every stream was answered whole")
    first = [round(answer.first_token_s, 5) for answer in answers if answer.first_token_s is not None]
    return Turn(len(answers) * tokens, round(seconds, 4), round(cpu_s, 2), first)


async def ask(url: str, streams: int, seed: str, tokens: int, key: str) -> list[Answer]:
    """The answers to the questions of this seed."""
    prompts = random.Random(f"{streams} {seed}")
    words = [[" ".join(str(prompts.randrange(1000)) for _ in range(16)) for _ in range(QUESTIONS[streams])]
             for _ in range(streams)]  # fmt: skip

    async def client(number: int) -> list[Answer]:
        await asyncio.sleep(number * BETWEEN_STREAMS_S)
        answers = []
        for chosen in words[number]:
            body = {
                "model": MODEL, "messages": [{"role": "user", "content": f"Tell a story about {chosen}."}],
                "max_tokens": tokens, "ignore_eos": True, "stream": True, "temperature": 0,
            }  # fmt: skip
            answers.append(await post(url, body, {"authorization": f"Bearer {key}"}))
        return answers

    return [answer for one in await asyncio.gather(*map(client, range(streams))) for answer in one]


FIGURES: dict[str, Callable[[Sequence[Turn]], float]] = {
    "tokens_per_s": lambda turns: sum(one.tokens for one in turns) / sum(one.seconds for one in turns),
    "ttft_median_s": lambda turns: statistics.median(first for one in turns for first in one.first_token_s),
    "cpu_s": lambda turns: sum(one.cpu_s for one in turns),
}


def row(cells: Cells, streams: int) -> dict[str, Any]:
    """Ratios to `bare`."""
    bare_turns = cells["bare", streams]
    found: dict[str, Any] = {"streams": streams}
    for name in ("lowbit", "bare again"):
        for figure, of in FIGURES.items():
            found[f"{name} / bare, {figure}"] = compared(of, cells[name, streams], bare_turns)
    return found


def compared(
    of: Callable[[Sequence[Turn]], float], ours: list[Turn], bare_turns: list[Turn]
) -> dict[str, float]:
    """A ratio with its standard error; rounds are drawn anew, both servers' turns of a round together."""
    generator = random.Random(0)
    draws = []
    for _ in range(1000):
        rounds = generator.choices(range(len(ours)), k=len(ours))
        draws.append(of([ours[one] for one in rounds]) / of([bare_turns[one] for one in rounds]))
    ratio = of(ours) / of(bare_turns)
    return {"ratio": round(ratio, 4), "standard_error": round(statistics.pstdev(draws), 4)}


if __name__ == "__main__":
    sys.exit(main())
