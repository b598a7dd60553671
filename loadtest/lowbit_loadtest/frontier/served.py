"""A server that has just started: warmed up, and asked what it says of itself. And how big a checkpoint is on disk."""

from pathlib import Path
from typing import Any

import httpx

from lowbit_loadtest.generate.http.target import Target
from lowbit_loadtest.generate.workers import OnRun
from lowbit_loadtest.runner import run_load_test
from lowbit_loadtest.scenario import Scenario, parse_scenario

Document = dict[str, Any]
ENGINE_FACTS = (
    "vllm",
    "device",
    "quantization",
    "dtype",
    "kv_cache_dtype",
    "kv_tokens",
    "kv_scales_in_force",
    "memory",
)
WEIGHTS = ("*.safetensors", "*.gguf", "*.bin")  # the first of which a directory has any


def warm_up(url: str, on_run: OnRun) -> None:
    """A few short answers, so that nothing is measured that only happens once."""
    run_load_test(_warm_up(), Target(url), on_run)


def _warm_up() -> Scenario:
    data = {
        "arrivals": {"kind": "closed", "concurrency": 4},
        "prompts": {"kind": "text"},
        "output": {"tokens": 16},
        "requests": 8,
    }
    return parse_scenario(data, "warm-up")


def server_facts(url: str) -> Document:
    """What the server says of its checkpoint and engine; empty for one that does not say."""
    try:
        answer = httpx.get(f"{url}/lowbit/checkpoint", timeout=10.0, trust_env=False)
        facts: Document = answer.json() if answer.status_code == httpx.codes.OK else {}
    except (httpx.HTTPError, OSError, ValueError):
        facts = {}
    engine, manifest = facts.get("engine") or {}, facts.get("manifest") or {}
    return {
        "engine": {key: engine[key] for key in ENGINE_FACTS if key in engine},
        "size": manifest.get("size"),
        "quality": manifest.get("quality"),
    }


def weight_bytes(directory: Path) -> int | None:
    """Of the files with weights; None where there are none."""
    for pattern in WEIGHTS:
        if files := list(directory.glob(pattern)):
            return sum(file.stat().st_size for file in files)
    return None
