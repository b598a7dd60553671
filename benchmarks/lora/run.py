"""A LoRA on a 4-bit checkpoint learns a format, and is served beside its base, whose answers stay what they were.

    python benchmarks/lora/run.py --checkpoint DIR --work DIR --out benchmarks/lora/results/format.json

Trains on some items, then asks others through the endpoint: first the checkpoint alone, then, with the adapter loaded,
the base again and the adapter. Exact match is of whole answers, greedy. A stopped script goes on with the training.
"""

import argparse
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.endpoint import lowbit_serve, write_result  # noqa: E402
from benchmarks.lora.records import conversation, items, question  # noqa: E402

from lowbit_core.log import configure_logging  # noqa: E402
from lowbit_recover.lora import Task, train_adapter  # noqa: E402
from lowbit_recover.lora_training import Settings  # noqa: E402

TRAINED, HELD, ASKED = 200, 16, 24
SEED = 7
SETTINGS = Settings(
    rank=16, alpha=32.0, epochs=2.0, rate=1.5e-3, batch_size=8, max_seq_length=160, evaluations=4, seed=SEED
)
ADAPTER = "record"


def main() -> None:
    given = options()
    configure_logging()
    given.work.mkdir(parents=True, exist_ok=True)
    drawn = items(TRAINED + HELD + ASKED, SEED)
    unseen, adapter = drawn[TRAINED + HELD :], given.work / ADAPTER
    record = trained(given.checkpoint, drawn[:TRAINED], drawn[TRAINED : TRAINED + HELD], given.work, adapter)
    with lowbit_serve(given.checkpoint, given.work / "alone.log") as server:
        before = [answer(server.url, None, item) for item in unseen]
    with lowbit_serve(
        given.checkpoint, given.work / "both.log", "--lora-modules", f"{ADAPTER}={adapter}"
    ) as server:
        beside = [answer(server.url, None, item) for item in unseen]
        after = [answer(server.url, ADAPTER, item) for item in unseen]
    result = {
        "checkpoint": given.checkpoint.name,
        "items": {"trained": TRAINED, "held_out": HELD, "asked": ASKED},
        "exact_match": {"base": matched(before, unseen), "base_beside_the_adapter": matched(beside, unseen),
                        "adapter": matched(after, unseen)},
        "base_answers_unchanged": sum(one == other for one, other in zip(before, beside, strict=True)),
        "example": {"asked": unseen[0]["asked"], "wanted": unseen[0]["answer"], "base": before[0], "adapter": after[0]},
        "adapter_bytes": sum(path.stat().st_size for path in adapter.glob("adapter_*")),
        "training": record,
    }  # fmt: skip
    write_result(given.out, result)
    print(json.dumps({name: result[name] for name in ("exact_match", "base_answers_unchanged")}))


def trained(
    checkpoint: Path, training: list[dict[str, str]], held: list[dict[str, str]], work: Path, adapter: Path
) -> dict[str, Any]:
    """Train, or go on, or take what is there; its record."""
    paths = [work / "training.jsonl", work / "held.jsonl"]
    for path, some in zip(paths, (training, held), strict=True):
        path.write_text("".join(json.dumps(conversation(item)) + "\n" for item in some), encoding="utf-8")
    task = Task(
        str(checkpoint), str(paths[0]), adapter, heldout=str(paths[1]), device="cpu", settings=SETTINGS
    )
    return train_adapter(task)


def answer(url: str, model: str | None, item: dict[str, str]) -> str:
    """What the endpoint says, greedy; `model` None is the base."""
    if model is None:
        with urllib.request.urlopen(f"{url}/v1/models") as reply:
            model = json.load(reply)["data"][0]["id"]
    body = {"model": model, "messages": question(item), "temperature": 0, "max_tokens": 48}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        return str(json.load(reply)["choices"][0]["message"]["content"])


def matched(answers: list[str], wanted: list[dict[str, str]]) -> float:
    """The share of answers that are right to the character."""
    return sum(one.strip() == item["answer"] for one, item in zip(answers, wanted, strict=True)) / len(wanted)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
