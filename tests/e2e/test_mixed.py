"""Different schemes and methods in one model: what stock vLLM, `lowbit serve` and `lowbit inspect` make of it."""

import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from scripts.demo import LOWBIT, get, serving
from tests.e2e.greedy import NEW_TOKENS, PROMPTS
from tests.e2e.test_families import greedy
from tests.tiny_models import SENTENCES, write_tiny_model

from lowbit_core.manifest import read_manifest
from lowbit_core.server_process import free_port
from lowbit_quantize.check.forecast import tensor_bytes
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.plan import make_plan
from lowbit_quantize.recipe import load_recipe

pytestmark = pytest.mark.engine

RECIPE = load_recipe(str(Path(__file__).with_name("mixed.yaml")))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "llama"
    return write_tiny_model(
        directory, sentences=SENTENCES, hidden_size=256, intermediate_size=512, num_hidden_layers=6
    )


@pytest.fixture(scope="module")
def checkpoint(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixed") / "checkpoint"
    quantize(str(base), RECIPE, out, torch.device("cpu"))
    return out


def test_stock_vllm_transformers_and_our_server_say_the_same(checkpoint: Path) -> None:
    engine, reference = (greedy(what, [checkpoint])[str(checkpoint)] for what in ("engine", "reference"))
    assert engine["texts"] == reference["texts"] == SENTENCES[:, PROMPTS.shape[1] :].tolist()
    assert engine["kv_cache_dtype"] == "fp8"
    with serving(checkpoint, free_port()) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        name = client.models.list().data[0].id
        answers = [
            client.completions.create(
                model=name,
                prompt=prompt,
                max_tokens=NEW_TOKENS,
                temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            for prompt in PROMPTS.tolist()
        ]
        document = get(f"{url}/lowbit/checkpoint")
    assert [answer.choices[0].model_extra["token_ids"] for answer in answers] == engine["texts"]  # type: ignore[index]
    weights, layers = document["manifest"]["weights"], document["engine"]["layers"]
    assert weights["scheme"].split("+") == ["W4A16", "W8A8", "FP8_DYNAMIC"]
    methods = Counter({kind["method"]: 0 for kind in layers})
    for kind in layers:
        methods[kind["method"]] += kind["count"] if "Linear" in kind["layer"] else 0
    assert methods["CompressedTensorsWNA16"] == 4 * 2 + 2  # qkv and o of four layers, gate and up of two
    assert methods["CompressedTensorsW8A8Int8"] == 2
    assert methods["CompressedTensorsW8A8Fp8"] == 4


def test_inspect_shows_the_mix(checkpoint: Path) -> None:
    done = subprocess.run(
        [*LOWBIT, "inspect", str(checkpoint)], stdout=subprocess.PIPE, text=True, check=True
    )
    for line in (
        "16 x W4A16 in groups of 32 by awq, then gptq",
        "4 x W4A16 in groups of 128 by awq",
        "14 linears: model.layers.0.self_attn.q_proj",
    ):
        assert line in done.stdout


def test_the_forecast_is_the_files_to_the_byte(base: Path, checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    assert tensor_bytes(make_plan(find_model(str(base)), RECIPE)) == manifest.size.bytes
