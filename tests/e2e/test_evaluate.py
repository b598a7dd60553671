"""`lowbit evaluate` on the demo's checkpoint: the figures that rode along, and the endpoint beside the process."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from scripts.demo import LOWBIT, find_demo_model
from tests.e2e.conftest import Demo

pytestmark = pytest.mark.engine

FACTS = {
    "France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo", "Spain": "Madrid", "Germany": "Berlin",
    "Russia": "Moscow", "China": "Beijing", "Greece": "Athens", "Portugal": "Lisbon", "Austria": "Vienna",
    "Poland": "Warsaw", "Norway": "Oslo", "Sweden": "Stockholm", "Cuba": "Havana", "Peru": "Lima",
}  # fmt: skip

TEXTS = {
    "Monday, Tuesday, Wednesday,": " Thursday, Friday, Saturday, Sunday. January, February, March, April, May, June,"
    " July, August, September, October, November, December.",
    "The sun is a star.": " It is a huge ball of hot gas that gives light and heat to the Earth. Without the sun,"
    " there would be no life on our planet, because plants need light to grow and animals need plants to eat.",
    "Once upon a time,": " there was a little girl who lived in a small village near the forest. Every day she walked"
    " to the river to fetch water for her mother, and every day she met an old man who told her stories.",
}


def evaluate(file: Path, *arguments: object) -> dict[str, Any]:
    """The JSON of `lowbit evaluate`, which must end with 0."""
    subprocess.run([*LOWBIT, "evaluate", *map(str, arguments), "--json", str(file)], check=True)
    document: dict[str, Any] = json.loads(file.read_text())
    return document


def test_models_loaded_whole_give_the_manifests_quality(demo: Demo, tmp_path: Path) -> None:
    found = evaluate(tmp_path / "text.json", demo.checkpoint, "--base", find_demo_model(), "--text")["text"]
    assert found["manifest"]["agrees"]
    assert found["mean_kld"] == pytest.approx(demo.report["mean_kld"], abs=2e-3)
    assert found["kv_cache_included"]


def test_the_endpoint_and_the_process_choose_alike(demo: Demo, server: str, tmp_path: Path) -> None:
    """The same answers, and the same probability of ordinary text, as far as kernels and FP8 round alike.

    Names of capitals are guesses of so small a model, whose probabilities hang on rounding: 0.44 nats apart on a CPU
    with AMX, 1.18 on one without. Ordinary text was 0.03 nats a token apart there.
    """
    capitals = list(FACTS.values())
    rows = [
        {
            "context": f"Question: What is the capital of {country}?\nAnswer:",
            "choices": [f" {capitals[(place + step) % len(capitals)]}" for step in range(4)],
        }
        for place, country in enumerate(FACTS)
    ]
    rows += [{"context": context, "choices": [text], "task": "cloze"} for context, text in TEXTS.items()]
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    served = tmp_path / "served.json"
    whole = evaluate(served, demo.checkpoint, "--target", server, "--items", items)["tasks"]["all"]["model"]
    assert whole["unanswered"] == 0
    assert whole["acc_norm"]["value"] > 0.5
    beside = evaluate(tmp_path / "own.json", demo.checkpoint, "--base", served, "--items", items)
    assert beside["tasks"]["all"]["changes"]["flips"] <= 2
    assert beside["tasks"]["cloze"]["changes"]["mean_logprob_shift"] < 0.1
