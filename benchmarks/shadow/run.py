"""What `--shadow` estimates from top-k lists, against the divergence over the whole vocabulary on the same tokens.

    python benchmarks/shadow/run.py CHECKPOINT BASE --work DIR --out benchmarks/shadow/results/NAME.json

Two servers: `lowbit serve BASE`, and `lowbit serve CHECKPOINT --shadow` with a share of 1. Chats are asked, streamed
and whole, greedily and by sampling, and the clients keep the token ids of questions and answers. When the shadow has
scored them all, its figures are read from /metrics, both servers end, and `lowbit evaluate`'s own modules load both
models and compare them at the same tokens, every word of the vocabulary. Means are over generated tokens, standard
errors over answers. What was served is kept in DIR/served.json, from which a run that was stopped goes on.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.endpoint import lowbit_serve, write_result  # noqa: E402

from lowbit_evaluate.in_process import find  # noqa: E402
from lowbit_evaluate.loaded_model import LoadedModel, load_model  # noqa: E402
from lowbit_evaluate.settings import Settings  # noqa: E402
from lowbit_quantize.quality import kl  # noqa: E402
from lowbit_server.shadow.divergence import Divergence, Position  # noqa: E402

SAMPLINGS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature 0.7, top-p 0.95": {"temperature": 0.7, "top_p": 0.95},
    "temperature 1": {"temperature": 1.0, "top_p": 1.0},
}
TOPICS = (
    "the sea", "how bees make honey", "a dog that found its way home", "gravity", "photosynthesis", "a soup for winter",
    "Napoleon", "why the sky is blue", "learning the piano", "a bridge", "the first train", "saving money",
)  # fmt: skip
FLAGS = ("--kv-cache-gib", "0.25", "--max-model-len", "2048", "--no-request-log")
SCORED_S = 900.0  # for a slow machine
Tokens = tuple[list[int], list[int]]  # of the prompt and of the answer


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--answers", type=int, default=12, help="for each way to sample")
    parser.add_argument("--tokens", type=int, default=120, help="of each answer at most")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    kept = arguments.work / "served.json"
    if not kept.exists():
        kept.write_text(json.dumps(serve(arguments)))
    document = json.loads(kept.read_text())
    served, found, after = document["served"], document["found"], document["after"]
    base, ours = (loaded(path) for path in (arguments.base, arguments.checkpoint))
    rows, whole = [], Divergence()
    for name, answers in served.items():
        exact = Divergence()
        for one in answers:
            positions = [Position(value, 0.0) for value in divergences(base, ours, one)]
            exact.add(positions)
            whole.add(positions)
        rows.append(row(name, exact, found[name]))
    everything = row("all", whole, after) | {
        "shadow_stderr": round(after["kld_stderr"], 5), "remainder": round(after["remainder"], 4)
    }  # fmt: skip
    write_result(arguments.out, {"checkpoint": arguments.checkpoint.name, "base": arguments.base.name,
                                 "flags": FLAGS, "rows": [*rows, everything]})  # fmt: skip
    for one in (*rows, everything):
        print(json.dumps(one))
    return 0 if everything["agrees"] else 1


def serve(arguments: argparse.Namespace) -> dict[str, Any]:
    """The token ids of what was asked and answered, and the shadow's figures for each way to sample and at the end."""
    served: dict[str, list[Tokens]] = {}
    found: dict[str, dict[str, float]] = {}
    after: dict[str, float] = {}
    with both_servers(arguments) as url:
        for name, sampling in SAMPLINGS.items():
            before = metrics(url)
            served[name] = [
                ask(url, number, sampling, arguments.tokens) for number in range(arguments.answers)
            ]
            after = wait_until_scored(url, sum(map(len, served.values())))
            found[name] = {key: after[key] - before[key] for key in ("nats_total", "tokens_total")}
            print(f"{name}: {len(served[name])} answers scored", file=sys.stderr)
    return {"served": served, "found": found, "after": after}


@contextmanager
def both_servers(arguments: argparse.Namespace) -> Iterator[str]:
    """The served model's URL; its base answers beside it."""
    with lowbit_serve(arguments.base, arguments.work / "base.log", *FLAGS) as base:
        shadow = ("--shadow", base.url, "--shadow-share", "1")
        with lowbit_serve(arguments.checkpoint, arguments.work / "served.log", *FLAGS, *shadow) as server:
            yield server.url


def ask(url: str, number: int, sampling: dict[str, float], tokens: int) -> Tokens:
    """One answer, every other one streamed, as token ids."""
    text = f"Tell me about {TOPICS[number % len(TOPICS)]}{'.' * (number // len(TOPICS))}"
    body = {
        "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "seed": number,
        "return_token_ids": True, "stream": number % 2 == 1, **sampling,
    }  # fmt: skip
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300).raise_for_status().text
    lines = (
        [answer]
        if number % 2 == 0
        else [line[6:] for line in answer.splitlines() if line.startswith("data: {")]
    )
    parts = [json.loads(line) for line in lines]
    prompt = next(part["prompt_token_ids"] for part in parts if part.get("prompt_token_ids"))
    generated = [token for part in parts for one in part["choices"] for token in one.get("token_ids") or ()]
    return prompt, generated


def metrics(url: str) -> dict[str, float]:
    """The shadow's figures by the rest of their names, and what became of answers."""
    page = httpx.get(f"{url}/metrics", timeout=60).raise_for_status().text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name.startswith("lowbit_shadow_"):
                name = sample.name.removeprefix("lowbit_shadow_")
                found[sample.labels.get("outcome", name)] = sample.value
    return found


def wait_until_scored(url: str, answers: int) -> dict[str, float]:
    """The figures once so many answers are scored; SystemExit where one was not."""
    deadline = time.monotonic() + SCORED_S
    while time.monotonic() < deadline:
        found = metrics(url)
        if lost := [
            name for name in ("queue_full", "too_long", "base_failed", "engine_failed") if found[name]
        ]:
            raise SystemExit(f"not every answer was scored: {lost}")
        if found["scored"] >= answers:
            return found
        time.sleep(1)
    raise SystemExit(f"{answers} answers were not scored within {SCORED_S:g} s")


def loaded(path: Path) -> LoadedModel:
    """As `lowbit evaluate` loads it: with the checkpoint's rounded inputs and FP8 cache."""
    return load_model(find(str(path), Settings("cpu", "auto", True, False)), torch.device("cpu"))


def divergences(base: LoadedModel, ours: LoadedModel, tokens: Tokens) -> Sequence[float]:
    """Nats at each generated token, over the whole vocabulary."""
    prompt, generated = tokens
    ids, same = torch.tensor([prompt + generated]), nn.Identity()
    found = kl.compare(base.hidden(ids), ours.hidden(ids), same, same, base.head, ids, ours.head, base.logits)
    values: list[float] = found.kld[0, len(prompt) - 1 :].tolist()
    return values


def row(name: str, exact: Divergence, shadow: dict[str, float]) -> dict[str, Any]:
    """Both means; they agree where they differ by no more than the standard error."""
    mean, stderr = exact.mean, exact.stderr
    assert mean is not None and stderr is not None, "two answers at least"  # noqa: PT018
    if exact.tokens != shadow["tokens_total"]:
        raise SystemExit(
            f"{name}: the shadow scored {shadow['tokens_total']:g} tokens, clients got {exact.tokens}"
        )
    estimate = shadow["nats_total"] / shadow["tokens_total"]
    return {
        "sampling": name, "answers": exact.answers, "tokens": exact.tokens, "shadow": round(estimate, 5),
        "evaluate": round(mean, 5), "evaluate_stderr": round(stderr, 5), "ratio": round(estimate / mean, 4),
        "agrees": abs(estimate - mean) <= stderr,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
