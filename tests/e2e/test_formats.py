"""AutoAWQ's and AutoGPTQ's formats in the real engine: they answer like the default one with the same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from scripts.demo import MODEL, get, serving
from tests.e2e.test_main_job import quantize_demo_model
from tests.tiny_models import write_tiny_model

from lowbit_core.server_process import free_port
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.recipe import load_recipe

pytestmark = pytest.mark.engine

FEW = ("calibration.sequences=8", "quality.sequences=2")
SHORT = (*FEW, "calibration.sequence_tokens=64", "quality.sequence_tokens=64", "kv_cache.dtype=none")
PROMPTS = [[1 + (start * step) % 500 for step in range(1, 24)] for start in (3, 17, 101, 251)]
TOKENS = 48
STOCK = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], enforce_eager=True, max_model_len=256)
prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
sampling = SamplingParams(temperature=0, max_tokens=int(sys.argv[3]), ignore_eos=True)
answers = llm.generate(prompts, sampling, use_tqdm=False)
print("ANSWERS", json.dumps([list(answer.outputs[0].token_ids) for answer in answers]), flush=True)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with biases, every size a multiple of 32."""
    directory = write_tiny_model(tmp_path_factory.mktemp("model"), "qwen2")
    config = json.loads((directory / "config.json").read_text())
    plain = {"use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * 3}
    (directory / "config.json").write_text(json.dumps(config | plain))
    return directory


def answers(model: Path, out: Path, *overrides: str) -> list[list[int]]:
    """Greedy token ids of stock vLLM on the model, quantized by AWQ with these overrides."""
    quantize(str(model), load_recipe("awq-g64", (*SHORT, *overrides)), out, torch.device("cpu"))
    # Where the machine's memory is shared, stock vLLM's CPU engine needs to be told how much to take.
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(out), json.dumps(PROMPTS), str(TOKENS)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWERS "))
    found: list[list[int]] = json.loads(line.removeprefix("ANSWERS "))
    return found


@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_stock_vllm_answers_alike_in_every_format(model: Path, tmp_path: Path, symmetric: str) -> None:
    formats = ["autoawq", "autogptq"] if symmetric == "true" else ["autoawq"]
    grid = f"weights.symmetric={symmetric}"
    expected = answers(model, tmp_path / "default", grid)
    assert len({token for answer in expected for token in answer}) > 20  # not one token over and over
    for name in formats:
        assert answers(model, tmp_path / name, grid, f"format={name}") == expected


def test_the_server_answers_where_every_linear_has_4_bits(model: Path, tmp_path: Path) -> None:
    """On a CPU with AMX the first product ended the worker: nothing in it had asked the system for the tiles."""
    quantize(str(model), load_recipe("awq-g64", SHORT), tmp_path / "out", torch.device("cpu"))
    with serving(tmp_path / "out", free_port()) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        name = client.models.list().data[0].id
        answer = client.completions.create(model=name, prompt=PROMPTS[0], max_tokens=8, temperature=0)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(PROMPTS[0])
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_the_server_runs_an_fp8_cache_with_unit_scales_as_the_manifest_says(tmp_path: Path) -> None:
    sets = [part for override in (*FEW, "kv_cache.dtype=fp8") for part in ("--set", override)]
    quantize_demo_model(tmp_path / "out", "--recipe", "awq-g64-autoawq", *sets)
    with serving(tmp_path / "out", free_port()) as url:
        document = get(f"{url}/lowbit/checkpoint")
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=24)  # type: ignore[arg-type]
    engine = document["engine"]
    assert document["manifest"]["kv_cache"]["source"] == "unit scales: the autoawq format carries none"
    assert (engine["kv_cache_dtype"], engine["kv_scales_in_force"]) == ("fp8", "unit")
    assert {(layer["k_scale"], layer["v_scale"]) for layer in engine["kv_scales"]} == {(1.0, 1.0)}
    assert "Paris" in (answer.choices[0].message.content or "")
