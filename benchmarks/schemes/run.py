"""How fast each scheme is served on this processor: bf16, W4A16, W8A8, side by side, by `lowbit loadtest`.

    python benchmarks/schemes/make.py --random --tokenizer DIR --out DIR
    python benchmarks/schemes/run.py bf16=DIR w4a16=DIR w8a8=DIR --model "1B, random weights" --table \
        --work DIR --out benchmarks/schemes/results/NAME.json
    python benchmarks/schemes/table.py

The first directory is what the others are compared with. All servers are up and one is loaded at a time; a round gives
each of them the same short load (prompts of 768 tokens for one token of output; then 1, 4 and 16 streams of outputs),
in an order that rotates, after a shorter one that warms up; each round has prompts of its own, which no cache of
prefixes holds. Compared are prompt tokens/s and output tokens/s: ratios to
the first, round by round, and the standard error of their mean. `--minutes` begins no round that would not end in time,
servers' starts included. The result names the processor, its instruction sets and the kernel of each layer. `--mock`
serves nothing: `lowbit serve` with an engine that only waits, to try the script.

A directory followed by `@PACKAGES` is served with the Python packages of that folder, zentorch on AMD's processors:

    pip install --target PACKAGES --no-deps zentorch==2.13.0.1 deprecated wrapt
    python benchmarks/schemes/run.py bf16=DIR w8a8=DIR w8a8-zentorch=DIR@PACKAGES ...

Where bf16 is slow (1B on two cores without its instructions), less of everything:

    --rounds 2 --minutes 12 --prompts 1 --prompt 256 --requests 1 --tokens 8
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.endpoint import LOWBIT, PYTHON, lowbit_serve, pinned, running, write_result  # noqa: E402
from benchmarks.mock_engine import MODEL, folder  # noqa: E402

from lowbit_core.cpu_speeds import instructions  # noqa: E402
from lowbit_core.server_process import ServerProcess  # noqa: E402

STREAMS = (1, 4, 16)
SHORT_PROMPT = 32
MAX_LAG_S = 0.5  # of the generator, beside engines on the same cores: rates over seconds do not see it
WARM_TOKENS = 2  # of each output of the turn that warms up
WARMING = 0  # the number of its round
FLAGS = (
    "--kv-cache-gib",
    "0.5",
    "--kv-cache-dtype",
    "bfloat16",
    "--max-num-seqs",
    "16",
    "--served-model-name",
    "m",
)
Speeds = dict[str, float]
Turn = Callable[[str, int], Speeds]  # of a checkpoint, in a round; WARMING where it only warms up


def main() -> None:
    began = time.monotonic()
    arguments = _arguments()
    directories = dict(one.split("=", 1) for one in arguments.checkpoints)
    arguments.work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(_server(where, arguments.work / f"{name}.log", mock=arguments.mock))
            for name, where in directories.items()
        }
        print(f"{len(servers)} servers are ready after {time.monotonic() - began:.0f} s", flush=True)
        checkpoints = {name: _checkpoint(server.url) for name, server in servers.items()}
        stack.enter_context(pinned(servers.values()))
        urls = {name: server.url for name, server in servers.items()}
        rounds = take_turns(
            list(urls),
            lambda name, number: _turn(urls[name], arguments, number),
            arguments.rounds,
            left_s=lambda: 60 * arguments.minutes - (time.monotonic() - began),
        )
    result = {
        "model": arguments.model,
        "table": arguments.table,
        "instructions": instructions(),
        "checkpoints": checkpoints,
        "load": {key: getattr(arguments, key) for key in ("prompts", "prompt", "requests", "tokens")},
        "rounds": rounds,
        "ratios": ratios(rounds),
    }
    write_result(arguments.out, result)
    print(json.dumps(result["ratios"]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=DIR[@PACKAGES]")
    parser.add_argument("--model", required=True, help="what the checkpoints are made of, in a few words")
    parser.add_argument("--table", action="store_true", help="the result goes into the server's table")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=math.inf, help="that all of it may take")
    parser.add_argument("--prompts", type=int, default=4, help="of a turn")
    parser.add_argument("--prompt", type=int, default=768, help="tokens of each of them")
    parser.add_argument("--requests", type=int, default=2, help="of each stream")
    parser.add_argument("--tokens", type=int, default=48, help="of each output")
    parser.add_argument("--mock", action="store_true", help="with an engine that only waits")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def _server(where: str, log: Path, *, mock: bool) -> AbstractContextManager[ServerProcess]:
    """Of DIR or DIR@PACKAGES."""
    if not mock:
        checkpoint, _, packages = where.partition("@")
        return lowbit_serve(Path(checkpoint), log, *FLAGS, packages=packages or None)
    command = [str(PYTHON), str(ROOT / "benchmarks" / "mock_engine.py"), "serve"]
    flags = ("--served-model-name", MODEL)
    return running([*command, str(folder(log.with_suffix(".mock"))), *flags], log, "/readyz")


def take_turns(
    names: Sequence[str], turn: Turn, count: int, left_s: Callable[[], float]
) -> dict[str, list[Speeds]]:
    """The speeds of each checkpoint in each of up to `count` rounds, after a turn of each that warms up.

    At least one round is run, and another only where as much time is left as the last one took.
    """
    for name in names:
        turn(name, WARMING)
    rounds: dict[str, list[Speeds]] = {name: [] for name in names}
    for number in range(1, count + 1):
        before = left_s()
        first = (number - 1) % len(names)
        for name in (*names[first:], *names[:first]):
            rounds[name].append(turn(name, number))
            print(number, name, json.dumps(rounds[name][-1]), flush=True)
        if left_s() < before - left_s():
            break
    return rounds


def _turn(url: str, arguments: argparse.Namespace, number: int) -> Speeds:
    """Prompt tokens/s, and output tokens/s at each number of streams; no round has the prompts of another."""
    warming = number == WARMING
    prompts = 1 if warming else arguments.prompts
    load = _load(
        url,
        arguments.work,
        seed=number,
        concurrency=1,
        requests=prompts,
        prompt=arguments.prompt,
        output=1,
    )
    speeds = {"prompt": load["total_tokens_per_s"] - load["output_tokens_per_s"]}
    for streams in STREAMS[-1:] if warming else STREAMS:
        load = _load(
            url,
            arguments.work,
            seed=number,
            concurrency=streams,
            requests=streams * (1 if warming else arguments.requests),
            prompt=SHORT_PROMPT,
            output=WARM_TOKENS if warming else arguments.tokens,
        )
        speeds[f"output at {streams}"] = load["output_tokens_per_s"]
    return speeds


def _load(url: str, work: Path, **load: int) -> dict[str, Any]:
    """One closed loop; its result."""
    out, scenario = work / "load.json", work / "load.yaml"
    scenario.write_text(
        json.dumps(
            {
                "arrivals": {"kind": "closed", "concurrency": load["concurrency"]},
                "prompts": {"kind": "synthetic", "tokens": load["prompt"]},
                "output": {"tokens": load["output"], "exact": True},
                "requests": load["requests"],
                "seed": load["seed"],
                "generator": {"workers": 1, "max_lag_s": MAX_LAG_S},
            }
        ),
        encoding="utf-8",
    )
    command = [str(LOWBIT), "loadtest", "--target", url, "--scenario", str(scenario), "--json", str(out)]
    command += ["--body", "seed="]  # none: answers are greedy, and the mock's seeds mean faults
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"lowbit loadtest ended with status {done.returncode}: {done.stderr.strip()[-1000:]}"
        )
    document: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return document


def _checkpoint(url: str) -> dict[str, Any]:
    """Its scheme, and the kernel of most of its linears."""
    with urllib.request.urlopen(f"{url}/lowbit/checkpoint", timeout=60) as answer:
        document: dict[str, Any] = json.load(answer)
    linears = [kind for kind in document["engine"]["layers"] if kind["kernel"] and "Linear" in kind["layer"]]
    kernel = max(linears, key=lambda kind: int(kind["count"]))["kernel"] if linears else None
    scheme = document["manifest"]["weights"]["scheme"] if document["manifest"] else "none"
    return {"scheme": scheme, "kernel": kernel, "layers": document["engine"]["layers"]}


def ratios(rounds: dict[str, list[Speeds]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Each checkpoint's speeds over the first one's: the mean over rounds and its standard error."""
    base = next(iter(rounds))
    return {
        name: {
            measure: _mean(
                [mine[measure] / theirs[measure] for mine, theirs in zip(turns, rounds[base], strict=True)]
            )
            for measure in turns[0]
        }
        for name, turns in rounds.items()
    }


def _mean(values: list[float]) -> dict[str, float | None]:
    """With a standard error where there are several: one round has none."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {
        "ratio": round(statistics.mean(values), 3),
        "error": None if error is None else round(error, 3),
    }


if __name__ == "__main__":
    main()
