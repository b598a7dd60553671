"""How fast each scheme is served on this processor: bf16, W4A16, W8A8, side by side, by `lowbit loadtest`.

    python benchmarks/schemes/make.py --random --tokenizer DIR --out DIR
    python benchmarks/schemes/run.py bf16=DIR w4a16=DIR w8a8=DIR --model "1B, random weights" --table \
        --work DIR --out benchmarks/schemes/results/NAME.json
    python benchmarks/schemes/table.py

The first directory is what the others are compared with. All servers are up and one is loaded at a time; a round gives
each of them the same short load (a prompt of 768 tokens for one token of output; then 1, 4 and 16 streams of outputs),
in an order that rotates. Compared are prompt tokens/s and output tokens/s: ratios to the first, round by round, and the
standard error of their mean. The result names the processor, its instruction sets and the kernel of each layer.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.endpoint import LOWBIT, lowbit_serve, pinned, write_result  # noqa: E402

from lowbit_core.cpu_speeds import instructions  # noqa: E402

STREAMS = (1, 4, 16)
PROMPT, SHORT_PROMPT = 768, 32
FLAGS = ("--kv-cache-dtype", "bfloat16", "--max-num-seqs", "16", "--served-model-name", "m")
Speeds = dict[str, float]


def main() -> None:
    arguments = _arguments()
    directories = dict(one.split("=", 1) for one in arguments.checkpoints)
    arguments.work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(lowbit_serve(Path(path), arguments.work / f"{name}.log", *FLAGS))
            for name, path in directories.items()
        }
        checkpoints = {name: _checkpoint(server.url) for name, server in servers.items()}
        stack.enter_context(pinned(servers.values()))
        rounds = _rounds({name: server.url for name, server in servers.items()}, arguments)
    result = {
        "model": arguments.model,
        "table": arguments.table,
        "instructions": instructions(),
        "checkpoints": checkpoints,
        "rounds": rounds,
        "ratios": _ratios(rounds),
    }
    write_result(arguments.out, result)
    print(json.dumps(result["ratios"]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--model", required=True, help="what the checkpoints are made of, in a few words")
    parser.add_argument("--table", action="store_true", help="the result goes into the server's table")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=4, help="of a turn")
    parser.add_argument("--tokens", type=int, default=48, help="of each output")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def _rounds(urls: dict[str, str], arguments: argparse.Namespace) -> dict[str, list[Speeds]]:
    """The speeds of each checkpoint in each round; the first round warms up and is not kept."""
    rounds: dict[str, list[Speeds]] = {name: [] for name in urls}
    names = list(urls)
    for number in range(arguments.rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found = _turn(urls[name], arguments)
            if number:
                rounds[name].append(found)
                print(number, name, json.dumps(found), flush=True)
    return rounds


def _turn(url: str, arguments: argparse.Namespace) -> Speeds:
    """Prompt tokens/s, and output tokens/s at each number of streams."""
    prompts = _load(url, arguments.work, concurrency=1, requests=arguments.prompts, prompt=PROMPT, output=1)
    speeds = {"prompt": prompts["total_tokens_per_s"] - prompts["output_tokens_per_s"]}
    for streams in STREAMS:
        load = _load(
            url,
            arguments.work,
            concurrency=streams,
            requests=2 * streams,
            prompt=SHORT_PROMPT,
            output=arguments.tokens,
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
                "generator": {"workers": 1},
            }
        ),
        encoding="utf-8",
    )
    command = [str(LOWBIT), "loadtest", "--target", url, "--scenario", str(scenario), "--json", str(out)]
    subprocess.run(command, check=True, capture_output=True)
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


def _ratios(rounds: dict[str, list[Speeds]]) -> dict[str, dict[str, dict[str, float]]]:
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


def _mean(values: list[float]) -> dict[str, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"ratio": round(statistics.mean(values), 3), "error": round(error, 3)}


if __name__ == "__main__":
    main()
