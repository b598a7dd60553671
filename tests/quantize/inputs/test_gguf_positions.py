"""Llama 3's positions in a GGUF file are the original's, by parameters that are found again, or the file is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantize.edited_bases import QUICK, quick_run
from tests.quantize.small_runs import PLAIN_CACHE, mean_kld, recipe_of
from tests.quantize.tiny_gguf import write_tiny_gguf
from transformers import AutoModelForCausalLM

from lowbit_core.errors import ModelError
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.model.sources.gguf_positions import llama3_parameters
from lowbit_quantize.plan import make_plan
from lowbit_quantize.quality.dataset import load_texts


def positions(theta: float, factor: float, length: int) -> dict[str, Any]:
    return {
        "rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": length,
    }  # fmt: skip


def converted(said: dict[str, Any], size: int) -> list[float]:
    """As llama.cpp's convert_hf_to_gguf.py computes them (LlamaModel.generate_extra_tensors)."""
    low, high, old = (
        said["low_freq_factor"], said["high_freq_factor"], said["original_max_position_embeddings"],
    )  # fmt: skip
    found = []
    for number in range(0, size, 2):
        wave = 2 * math.pi * said["rope_theta"] ** (number / size)
        if wave < old / high:
            found.append(1.0)
        elif wave > old / low:
            found.append(said["factor"])
        else:
            smooth = (old / wave - low) / (high - low)
            found.append(1 / ((1 - smooth) / said["factor"] + smooth))
    return found


@pytest.mark.parametrize(
    ("theta", "factor", "length", "size"),
    [(500000.0, 8.0, 8192, 128), (500000.0, 32.0, 8192, 64), (10000.0, 4.0, 64, 32), (5e5, 16.0, 4096, 80)],
)
def test_the_parameters_of_published_factors_are_found_again(
    theta: float, factor: float, length: int, size: int
) -> None:
    said = positions(theta, factor, length)
    factors = torch.tensor(converted(said, size))
    assert llama3_parameters(factors, theta) == said
    assert llama3_parameters(factors * torch.linspace(1, 1.01, len(factors)), theta) is None


def test_a_file_with_factors_walks_as_its_original(tmp_path: Path) -> None:
    said = positions(10000.0, 8.0, 64)
    file = write_tiny_gguf(tmp_path / "model", rope_freqs=converted(said, 32), rope_parameters=said)
    manifest = quick_run(file, tmp_path / "out", PLAIN_CACHE)
    recipe = recipe_of("rtn-g64", *QUICK)
    ids = load_texts(recipe.calibration, recipe.quality, find_model(str(file)).tokenizer(), 512)[1].ids
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        for path in (file.parent, tmp_path / "out")
    )
    assert mean_kld(before, after, ids) == pytest.approx(manifest.quality.mean_kld, abs=2e-3)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: written["rope_parameters"][key] for key in said} == said
    assert written["rope_scaling"]["rope_type"] == "llama3"
    assert written["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    "freqs", [[1.0] * 15 + [3.0], [float("nan")] * 16, [0.0] * 16, [-1.0] * 16, [2.0] * 5]
)
def test_other_factors_are_refused_by_name(tmp_path: Path, freqs: list[float]) -> None:
    file = write_tiny_gguf(tmp_path / "model", rope_freqs=freqs)
    with pytest.raises(ModelError, match=r"has rope_freqs\.weight, which .* another model would come out"):
        quick_run(file, tmp_path / "out")
    assert make_plan(find_model(str(file)), recipe_of("rtn-g64")).parameters
    assert not (tmp_path / "out" / "lowbit.json").exists()
