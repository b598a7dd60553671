"""Do `lowbit loadtest`, AIPerf and `vllm bench serve` measure the same on the same server?

    python benchmarks/loadtest_agreement/run.py CHECKPOINT --aiperf ENV/bin/aiperf --json FILE [--rate 2 [--turns 3]]

One workload for all: the same prompts in the same order, greedy, a fixed number of output tokens, in a closed loop or,
with `--rate`, sent at constant intervals whatever the server does. In a closed loop a tool's own time between an answer
and the next request is part of what it measures; at a rate it is not. With `--turns` the workload is a trace of
conversations in Bailian's form, whose prompts grow by their blocks, sent at its own times to /v1/completions; the words
are each tool's own, and new in each repetition, so that the prefix cache has only what turns share.

The tools take turns, repetition by repetition, after one run that is thrown away (it fills the server's prefix cache).
vLLM's benchmark runs in this environment (it needs pandas), AIPerf 0.13.0 in one of its own. The server's worker has
the first core to itself; the rest of the server and the tools share the others. Two tools agree on one number when
their medians differ by at most 5 %, or the ranges of their repetitions overlap. Throughput is all output tokens over
the whole run, as the peers count it.

Inter-token latency is the mean gap between chunks with text, ours and AIPerf's (there "inter chunk latency"). vLLM's
also counts chunks without text, the first of which only carries the role: with n tokens it is (n - 1) / n of its own
time per output token, whatever the gaps. It is in the rows and is compared as time per output token.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.endpoint import lowbit_serve, pinned, write_result

MODEL = "agreement"
TOKENIZER = "lowbit/agreement"
TOOLS = ("lowbit", "aiperf", "vllm")
LIMIT = 0.05
MOST_SPREAD = 0.25  # of the median; ranges wider than that overlap whatever was measured
METRICS = {
    "aiperf": ("ttft_mean_ms", "ttft_p50_ms", "itl_mean_ms", "tpot_mean_ms", "output_tokens_per_s"),
    "vllm": ("ttft_mean_ms", "ttft_p50_ms", "tpot_mean_ms", "output_tokens_per_s"),
}
WORDS = ("river", "stone", "light", "paper", "window", "garden", "engine", "market", "letter", "winter")
VLLM = """import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())"""
LOWBIT = "import sys; from lowbit_core.cli import main; sys.exit(main())"
Numbers = dict[str, float | None]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--aiperf", type=Path, required=True, help="its command")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument(
        "--rate", type=float, help="requests/s at constant intervals, instead of a closed loop"
    )
    parser.add_argument("--turns", type=int, help="of a conversation, sent as a trace; --rate is needed")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.turns and not arguments.rate:
        parser.error("--turns: a trace has times; give --rate, requests/s in all")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with (
            lowbit_serve(arguments.checkpoint, log, "--served-model-name", MODEL) as server,
            pinned([server]),
        ):
            rows = measure(Work(server.url, Path(folder), arguments), arguments.repetitions)
    document = {
        "workload": {
            name: getattr(arguments, name)
            for name in ("concurrency", "rate", "turns", "requests", "prompt_words", "output_tokens", "seed")
        },
        "agreement": [agreement(rows, peer, metric) for peer, found in METRICS.items() for metric in found],
        "rows": rows,
    }
    write_result(arguments.json, document)
    for one in document["agreement"]:
        print(json.dumps(one))


def measure(work: "Work", repetitions: int) -> list[dict[str, Any]]:
    """The tools in turn, each first in some repetitions."""
    work.lowbit(repetitions)
    rows = []
    for repetition in range(repetitions):
        first = repetition % len(TOOLS)
        for name in TOOLS[first:] + TOOLS[:first]:
            rows.append({"tool": name, "repetition": repetition, **getattr(work, name)(repetition)})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


class Work:
    """The workload as each tool takes it."""

    def __init__(self, url: str, folder: Path, arguments: argparse.Namespace) -> None:
        self.url, self.folder, self.arguments = url, folder, arguments
        rng = random.Random(arguments.seed)
        prompts = [
            " ".join(rng.choice(WORDS) for _ in range(arguments.prompt_words))
            for _ in range(arguments.requests)
        ]
        for key, file in (("prompt", "ours.jsonl"), ("text", "aiperf.jsonl")):
            (folder / file).write_text("".join(json.dumps({key: prompt}) + "\n" for prompt in prompts))
        (folder / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trace(arguments)))
        cache_tokenizer(arguments.checkpoint, folder / "hub")
        (folder / "scenario.yaml").write_text(json.dumps(self._scenario()))  # JSON is YAML

    def _scenario(self) -> dict[str, Any]:
        arguments = self.arguments
        closed = {"kind": "closed", "concurrency": arguments.concurrency}
        common = {"requests": arguments.requests, "generator": {"workers": 1, "max_lag_s": 1}}
        if arguments.turns:
            replay = {"kind": "replay", "path": str(self.folder / "trace.jsonl"), "format": "bailian"}
            return {"arrivals": replay, "output": {"exact": True}, **common}
        return {
            "arrivals": {"kind": "constant", "rate_rps": arguments.rate} if arguments.rate else closed,
            "prompts": {"kind": "file", "path": str(self.folder / "ours.jsonl")},
            "output": {"tokens": arguments.output_tokens, "exact": True},
            **common,
        }

    def lowbit(self, repetition: int) -> Numbers:
        out = self.folder / "ours.json"
        endpoint = "/v1/completions" if self.arguments.turns else ""
        command = [
            sys.executable, "-c", LOWBIT, "loadtest", "--target", self.url + endpoint, "--model", MODEL,
            "--scenario", str(self.folder / "scenario.yaml"), "--seed", str(repetition), "--json", str(out),
        ]  # fmt: skip
        _run(command)
        found = json.loads(out.read_text())
        return {
            "ttft_mean_ms": 1000 * found["ttft_s"]["mean"],
            "ttft_p50_ms": 1000 * found["ttft_s"]["p50"],
            "itl_mean_ms": 1000 * found["inter_token_latency_s"]["mean"],
            "tpot_mean_ms": 1000 * found["time_per_output_token_s"]["mean"],
            "output_tokens_per_s": found["output_tokens"] / found["duration_s"],
        }

    def aiperf(self, repetition: int) -> Numbers:
        rate, streams = self.arguments.rate, str(self.arguments.concurrency)
        times = (
            ["--request-rate", str(rate), "--request-rate-mode", "constant"]
            if rate
            else ["--concurrency", streams]
        )
        prompts = ["--endpoint-type", "chat", "--input-file", str(self.folder / "aiperf.jsonl"),
                   "--custom-dataset-type", "single_turn", "--dataset-sampling-strategy", "sequential",
                   "--extra-inputs", f"max_tokens:{self.arguments.output_tokens}", *times]  # fmt: skip
        trace = ["--endpoint-type", "completions", "--input-file", str(self.folder / "trace.jsonl"),
                 "--custom-dataset-type", "bailian_trace", "--fixed-schedule"]  # fmt: skip
        command = [
            str(self.arguments.aiperf), "profile", "--model", MODEL, "--url", self.url, "--streaming",
            "--tokenizer", TOKENIZER, *(trace if self.arguments.turns else prompts),
            "--request-count", str(self.arguments.requests), "--random-seed", str(repetition),
            "--extra-inputs", "ignore_eos:true", "--extra-inputs", "temperature:0", "--use-server-token-count",
            "--output-artifact-dir", str(self.folder / "aiperf"), "--ui", "none",
        ]  # fmt: skip
        _run(command, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(self.folder / "hub"))
        found = json.loads((self.folder / "aiperf/profile_export_aiperf.json").read_text())
        return {
            "ttft_mean_ms": found["time_to_first_token"]["avg"],
            "ttft_p50_ms": found["time_to_first_token"]["p50"],
            "itl_mean_ms": found["inter_chunk_latency"]["avg"] if "inter_chunk_latency" in found else None,
            "tpot_mean_ms": found["inter_token_latency"]["avg"],
            "output_tokens_per_s": found["output_token_throughput"]["avg"],
        }

    def vllm(self, repetition: int) -> Numbers:
        rate, streams = self.arguments.rate, str(self.arguments.concurrency)
        times = (
            ["--request-rate", str(rate), "--burstiness", "inf"] if rate else ["--max-concurrency", streams]
        )
        prompts = ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--dataset-name", "custom",
                   "--dataset-path", str(self.folder / "ours.jsonl"), "--disable-shuffle", "--skip-chat-template",
                   "--custom-output-len", str(self.arguments.output_tokens), "--ignore-eos", *times]  # fmt: skip
        trace = ["--backend", "openai", "--endpoint", "/v1/completions", "--dataset-name", "timed_trace",
                 "--dataset-path", str(self.folder / "trace.jsonl")]  # fmt: skip
        command = [
            sys.executable, "-c", VLLM, *(trace if self.arguments.turns else prompts),
            "--base-url", self.url, "--model", MODEL, "--tokenizer", str(self.arguments.checkpoint),
            "--seed", str(repetition), "--num-prompts", str(self.arguments.requests), "--temperature", "0",
            "--percentile-metrics", "ttft,tpot,itl",
            "--save-result", "--result-dir", str(self.folder), "--result-filename", "vllm.json", "--disable-tqdm",
        ]  # fmt: skip
        _run(command)
        found = json.loads((self.folder / "vllm.json").read_text())
        return {
            "ttft_mean_ms": found["mean_ttft_ms"],
            "ttft_p50_ms": found["median_ttft_ms"],
            "itl_mean_ms": found["mean_itl_ms"],
            "tpot_mean_ms": found["mean_tpot_ms"],
            "output_tokens_per_s": found["output_throughput"],
        }


def trace(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Conversations whose turns follow each other in turn, four at a time, as rows of Bailian's form.

    Each turn's prompt is the one before, its answer, and as many new tokens as `prompt_words`, in blocks of 16. Rows
    name no parent: every tool sends each at its own time.
    """
    turns, rows, block = arguments.turns or 1, [], 0
    new, answer = (-(-count // 16) for count in (arguments.prompt_words, arguments.output_tokens))
    blocks: dict[int, list[int]] = {}
    for number in range(arguments.requests):
        conversation = number // (4 * turns) * 4 + number % 4
        grown = blocks.setdefault(conversation, [])
        more = new + (answer if grown else 0)
        grown += range(block, block + more)
        block += more
        rows.append({
            "chat_id": number, "parent_chat_id": -1, "timestamp": number / (arguments.rate or 1), "type": "text",
            "turn": 1, "input_length": 16 * len(grown), "output_length": arguments.output_tokens,
            "hash_ids": list(grown),
        })  # fmt: skip
    return rows


def cache_tokenizer(checkpoint: Path, hub: Path) -> None:
    """The checkpoint's tokenizer as the hub's cache holds one: AIPerf's workers for traces read no directory."""
    home, commit = hub / f"models--{TOKENIZER.replace('/', '--')}", "0" * 40
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text(commit)
    (home / "snapshots" / commit).mkdir(parents=True)
    for file in (*checkpoint.glob("*.json"), *checkpoint.glob("*.jinja")):
        shutil.copy(file, home / "snapshots" / commit)


def _run(command: list[str], **more: str) -> None:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    } | more
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(
            f"{command[:3]} ended with status {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )


def agreement(rows: list[dict[str, Any]], peer: str, metric: str) -> dict[str, Any]:
    """One number of ours against a peer's."""
    ours, theirs = (
        [row[metric] for row in rows if row["tool"] == name and row[metric] is not None]
        for name in ("lowbit", peer)
    )
    if not theirs:
        return {"metric": metric, "peer": peer, "agrees": None}
    difference = median(ours) / median(theirs) - 1
    overlap = min(ours) <= max(theirs) and min(theirs) <= max(ours)
    within = abs(difference) <= LIMIT
    quiet = all(max(one) - min(one) <= MOST_SPREAD * median(one) for one in (ours, theirs))
    return {
        "metric": metric,
        "peer": peer,
        "ours": [round(value, 3) for value in (median(ours), min(ours), max(ours))],
        "theirs": [round(value, 3) for value in (median(theirs), min(theirs), max(theirs))],
        "difference": round(difference, 4),
        "within_5_percent": within,
        "ranges_overlap": overlap,
        "agrees": (within or overlap) if quiet else None,  # None: too noisy to say
    }


if __name__ == "__main__":
    main()
