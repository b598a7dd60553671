"""Fewer layers, channels and heads: what stock vLLM and plain transformers say of the same checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.e2e.test_families import equal_up_to_near_ties, greedy
from tests.tiny_models import SENTENCES, write_tiny_model
from transformers import AutoConfig

from lowbit_quantize.pipeline import quantize
from lowbit_quantize.recipe import parse_recipe

pytestmark = pytest.mark.engine

SCHEMES = {
    "bf16": (),
    "w4a16": ({"match": "*", "scheme": "W4A16", "group_size": 64, "methods": ["gptq"]},),
    "w8a8": ({"match": "*", "scheme": "W8A8", "methods": ["gptq"]},),
}
PASSES: list[dict[str, Any]] = [
    {"drop_layers": {"count": 1, "criterion": "measured", "num_samples": 4}},
    {"prune_width": {"mlp_ratio": 0.25, "kv_groups": 2}},
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A smaller model in every scheme, of one that was taught sentences, and is calibrated on them."""
    directory = tmp_path_factory.mktemp("structure")
    sizes: dict[str, Any] = {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8,
    }  # fmt: skip
    base = write_tiny_model(directory / "base", sentences=SENTENCES, num_key_value_heads=4, **sizes)
    ids = directory / "ids.json"
    ids.write_text(json.dumps({"input_ids": SENTENCES.repeat(16, 1).tolist()}))
    text = {"token_ids": str(ids)}
    for scheme, rules in SCHEMES.items():
        recipe = {
            "kv_cache": {"dtype": "none"},  # vLLM's CPU engine writes FP8 otherwise (test_vllm_fp8_cache.py)
            "modules": list(rules), "passes": [*PASSES, "quantize"] if rules else PASSES,
            "calibration": text, "quality": {"num_samples": 4, "max_seq_length": 64, "isolate": False},
        }  # fmt: skip
        quantize(str(base), parse_recipe(recipe, "of a test"), directory / scheme, torch.device("cpu"))
    return {scheme: directory / scheme for scheme in SCHEMES}


def test_stock_vllm_and_transformers_say_the_same(checkpoints: dict[str, Path]) -> None:
    directories = list(checkpoints.values())
    engine, reference = (greedy(what, directories) for what in ("engine", "reference"))
    for name, directory in checkpoints.items():
        clear = equal_up_to_near_ties(engine[str(directory)], reference[str(directory)])
        assert clear > 0.5 * sum(map(len, reference[str(directory)]["texts"])), name


def test_configurations_say_what_is_left(checkpoints: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(checkpoints["bf16"])
    sizes = (
        config.num_hidden_layers,
        config.intermediate_size,
        config.num_key_value_heads,
        config.num_attention_heads,
    )
    assert sizes == (5, 384, 2, 4)
    assert config.head_dim == 32
