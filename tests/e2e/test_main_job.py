"""The main job on the real model: what the demo shows, and what it may be held to."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from safetensors import safe_open
from scripts.demo import LOWBIT, MODEL, find_demo_model, get, serving
from tests.e2e.conftest import Demo
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from lowbit_core.manifest import Manifest, read_manifest
from lowbit_core.server_process import free_port
from lowbit_quantize.quality.dataset import load_texts
from lowbit_quantize.recipe import parse_recipe

pytestmark = pytest.mark.engine

PROMPTS = (
    "What is the capital of Germany?",
    "Write a haiku about the sea.",
    "List three prime numbers.",
    "Explain gravity to a child in two sentences.",
    "def fibonacci(n):",
)
MAX_TOKENS = 48
WORKER_EXTENSION = "lowbit_server.engine.worker.WorkerExtension"
STOCK = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], enforce_eager=True, worker_extension_cls=sys.argv[4])
chats = [[{"role": "user", "content": prompt}] for prompt in json.loads(sys.argv[2])]
answers = llm.chat(chats, SamplingParams(temperature=0, max_tokens=int(sys.argv[3])), use_tqdm=False)
print("ANSWERS", json.dumps([answer.outputs[0].text for answer in answers]), flush=True)
"""


def manifest_of(directory: Path) -> Manifest:
    manifest = read_manifest(directory)
    assert manifest is not None
    return manifest


def quantize_demo_model(out: Path, *arguments: str) -> dict[str, Any]:
    command = [*LOWBIT, "quantize", "--model", str(find_demo_model()), "--out", str(out), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def test_the_demo_answers_and_its_stream_equals_its_whole_answer(demo: Demo) -> None:
    assert "Berlin" in demo.report["answer"]
    assert demo.report["streamed_answer"] == demo.report["answer"]
    assert demo.report["generation_tokens_per_second"] > 0


def test_the_demo_shrinks_the_model_and_stays_close_to_it(demo: Demo) -> None:
    assert demo.report["linear_bits_per_weight"] <= 4.6
    assert demo.report["bytes"] < 0.45 * demo.report["base_bytes"]
    assert 0 < demo.report["mean_kld"] < 0.2
    assert demo.report["top1_agreement"] > 0.8


def test_an_fp8_cache_holds_twice_the_tokens(demo: Demo) -> None:
    assert demo.report["kv_tokens_fp8"] >= 1.9 * demo.report["kv_tokens_bf16"] > 0


def stock_vllm_answers(checkpoint: Path, worker_extension: str = "") -> list[str]:
    """Greedy answers to PROMPTS of vLLM alone, or with a class of ours mixed into its worker."""
    # Where the machine's memory is shared, stock vLLM's CPU engine needs to be told how much to take; where it has
    # AMX, that activations stay as they are (server cli.py).
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment["VLLM_CPU_INT4_W4A8"] = "0"
    asked = [str(checkpoint), json.dumps(PROMPTS), str(MAX_TOKENS), worker_extension]
    done = subprocess.run(
        [sys.executable, "-c", STOCK, *asked],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**environment_without_lowbit(), **environment},
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWERS "))
    answers: list[str] = json.loads(line.removeprefix("ANSWERS "))
    return answers


def test_stock_vllm_opens_the_checkpoint_and_answers(demo: Demo) -> None:
    answers = stock_vllm_answers(demo.checkpoint)
    assert "Berlin" in answers[0]
    assert all(answers)


def test_vllm_gives_the_same_greedy_text_as_our_server(demo: Demo, server: str) -> None:
    """On CPUs vLLM itself cuts an FP8 cache off toward zero, our worker rounds it; nothing else differs."""
    client = OpenAI(base_url=f"{server}/v1", api_key="none")
    ours = [
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=MAX_TOKENS
        )
        .choices[0]
        .message.content
        for prompt in PROMPTS
    ]
    assert stock_vllm_answers(demo.checkpoint, WORKER_EXTENSION) == ours


def environment_without_lowbit() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("LOWBIT_")}


def checkpoint_scales(directory: Path) -> Iterator[tuple[str, float]]:
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name.endswith(("k_scale", "v_scale")):
                    yield name, file.get_tensor(name).item()


def test_the_running_engine_uses_the_checkpoints_kv_scales_in_every_layer(demo: Demo, server: str) -> None:
    engine = get(f"{server}/lowbit/checkpoint")["engine"]
    running = {
        f"model.layers.{layer['layer']}.self_attn.{name}": layer[name]
        for layer in engine["kv_scales"]
        for name in ("k_scale", "v_scale")
    }
    stored = dict(checkpoint_scales(demo.checkpoint))
    assert len(stored) == 60
    assert len(set(stored.values())) > 50  # calibrated, not a default
    assert running == pytest.approx(stored, rel=1e-7)
    assert engine["kv_cache_dtype"].startswith("fp8")


def test_metrics_hold_vllms_and_ours(server: str) -> None:
    client = OpenAI(base_url=f"{server}/v1", api_key="none")
    client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=64)
    with urllib.request.urlopen(f"{server}/metrics") as response:
        text = response.read().decode()
    values = dict(re.findall(r"^(\w[\w:]*(?:\{[^}]*\})?) (\S+)$", text, re.MULTILINE))
    memory = {
        component: float(values[f'lowbit_memory_bytes{{component="{component}",device="cpu"}}'])
        for component in ("weights", "kv_cache", "free", "total")
    }
    assert 100e6 < memory["weights"] < 200e6
    assert memory["kv_cache"] == pytest.approx(2**30, rel=0.01)
    assert memory["free"] < memory["total"]
    assert float(values[f'lowbit_generation_tokens_per_second{{model="{MODEL}"}}']) > 0
    assert float(values[f'lowbit_prompt_tokens_per_second{{model="{MODEL}"}}']) > 0


def test_health_says_alive_and_ready(server: str) -> None:
    for path in ("/livez", "/readyz"):
        with urllib.request.urlopen(server + path) as response:
            assert response.status == 200


def test_a_checkpoint_that_was_tampered_with_is_refused_before_the_engine_starts(
    demo: Demo, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(demo.checkpoint, copy)
    shard = sorted(copy.glob("*.safetensors"))[3]
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 1
    shard.write_bytes(content)
    done = subprocess.run([*LOWBIT, "serve", str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{shard.name} does not match its SHA-256" in done.stderr.splitlines()[-1]
    verify = subprocess.run(
        [*LOWBIT, "inspect", str(copy), "--verify"], capture_output=True, text=True, check=False
    )
    assert verify.returncode == 2


def test_awq_has_at_most_half_the_divergence_of_round_to_nearest(demo: Demo, tmp_path: Path) -> None:
    rtn = quantize_demo_model(tmp_path / "rtn", "--recipe", "rtn-g64")
    ours, control = manifest_of(demo.checkpoint), manifest_of(tmp_path / "rtn")
    assert ours.quality.heldout == control.quality.heldout
    assert ours.calibration == control.calibration
    assert ours.calibration is not None
    assert (ours.calibration.num_samples, ours.calibration.max_seq_length) == (32, 512)
    assert demo.report["mean_kld"] <= 0.5 * rtn["mean_kld"]


def test_the_demo_exported_without_its_cache_scales_is_served_with_a_cache_of_16_bits(
    demo: Demo, tmp_path: Path
) -> None:
    command = [*LOWBIT, "export", str(demo.checkpoint), "--to", "autoawq", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(done.stdout.strip().splitlines()[-1])["left_out"] == ["scales of an FP8 KV cache"]
    with serving(tmp_path / "out", free_port()) as url:
        document = get(f"{url}/lowbit/checkpoint")
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        messages = [{"role": "user", "content": "What is the capital of Germany?"}]
        answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=24)  # type: ignore[arg-type]
    assert document["manifest"]["kv_cache"] is None
    assert not document["engine"]["kv_cache_dtype"].startswith("fp8")
    assert "Berlin" in (answer.choices[0].message.content or "")


def test_quality_of_the_walk_is_what_a_reload_in_plain_transformers_measures(tmp_path: Path) -> None:
    out = tmp_path / "weights-only"
    few = (
        "--set",
        "calibration.num_samples=8",
        "--set",
        "quality.num_samples=8",
        "--set",
        "kv_cache.dtype=none",
    )
    result = quantize_demo_model(out, "--recipe", "awq-g64", *few)
    recipe = parse_recipe(manifest_of(out).recipe, "manifest")
    ids = load_texts(recipe.calibration, recipe.quality, AutoTokenizer.from_pretrained(out), 49152)[1].ids
    path = find_demo_model()
    base = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
    )
    reloaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    total = 0.0
    with torch.inference_mode():
        for row in ids:
            p, q = (torch.log_softmax(_logits(model, row), -1) for model in (base, reloaded))
            total += float((p.exp() * (p - q)).sum(-1).mean())
    assert total / len(ids) == pytest.approx(result["mean_kld"], abs=1e-4)


def _logits(model: Any, row: torch.Tensor) -> torch.Tensor:
    """In float32, as the walk makes them; transformers rounds logits to bfloat16, 0.0011 nats here."""
    hidden: torch.Tensor = model(row[None], output_hidden_states=True).hidden_states[-1][0, :-1]
    matrix: torch.Tensor = model.get_input_embeddings().weight  # tied
    return hidden.float() @ matrix.float().T
