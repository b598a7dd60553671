"""AutoAWQ's and AutoGPTQ's formats in the real engine: they answer like the default one with the same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from scripts.demo import serving
from tests.tiny_models import write_tiny_model

from lowbit_core.server_process import free_port
from lowbit_quantize.export.autoawq import AutoAwq
from lowbit_quantize.export.autogptq import AutoGptq
from lowbit_quantize.export.exporter import Exporter, export
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.recipe import load_recipe

pytestmark = pytest.mark.engine

SHORT = (
    "calibration.num_samples=8",
    "quality.num_samples=2",
    "calibration.max_seq_length=64",
    "quality.max_seq_length=64",
    "kv_cache.dtype=none",
)
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


def answers(checkpoint: Path) -> list[list[int]]:
    """Greedy token ids of stock vLLM."""
    # Where the machine's memory is shared, stock vLLM's CPU engine needs to be told how much to take.
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(checkpoint), json.dumps(PROMPTS), str(TOKENS)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWERS "))
    found: list[list[int]] = json.loads(line.removeprefix("ANSWERS "))
    return found


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM"])
def test_stock_vllm_answers_alike_in_every_format(model: Path, tmp_path: Path, scheme: str) -> None:
    exporters: list[Exporter] = [AutoAwq(), AutoGptq()] if scheme == "W4A16" else [AutoAwq()]
    recipe = load_recipe("awq-g64", (*SHORT, f"modules.0.scheme={scheme}"))
    quantize(str(model), recipe, tmp_path / "default", torch.device("cpu"))
    expected = answers(tmp_path / "default")
    assert len({token for answer in expected for token in answer}) > 20  # not one token over and over
    for exporter in exporters:
        export(tmp_path / "default", exporter, tmp_path / exporter.name)
        assert answers(tmp_path / exporter.name) == expected


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
