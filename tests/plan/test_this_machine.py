"""`lowbit plan` on this machine's CPU: measured by the engine, run, and held against what came."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit_core.manifest import read_manifest
from lowbit_plan.targets import Targets
from lowbit_plan.twin import write_twin
from lowbit_plan.verify import load_of
from lowbit_quantize.model.reference import find_model

Run = Callable[..., tuple[int, dict[str, Any], str]]
Models = Callable[[str], Path]
SMALL = tuple(
    part
    for one in ("num_samples=2", "max_seq_length=64")
    for section in ("calibration", "quality")
    for part in ("--set", f"{section}.{one}")
)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3_text"])
def test_a_twin_has_the_models_layers_words_and_tokenizer(
    tiny_model: Models, tmp_path: Path, family: str
) -> None:
    reference = find_model(str(tiny_model(family)))
    name, work = write_twin(reference, tmp_path / "twin")
    twin = find_model(str(tmp_path / "twin"))
    assert twin.config.get_text_config().num_hidden_layers == work.layers
    assert twin.config.get_text_config().vocab_size == reference.config.get_text_config().vocab_size
    assert twin.tokenizer()("a word")["input_ids"] == reference.tokenizer()("a word")["input_ids"]
    assert name == write_twin(reference, tmp_path / "again")[0]


def test_the_load_ends_at_the_context() -> None:
    one = load_of(Targets(1 << 30, context=512, streams=4, prompt=128))
    assert 504 <= one.prompt + one.output <= 512
    assert (one.streams, one.requests) == (4, 8)
    short = load_of(Targets(1 << 30, context=6, streams=1, prompt=2))
    assert short.prompt + short.output <= 6


@pytest.mark.engine
def test_a_plan_is_run_and_held_beside_what_was_predicted(
    plan: Run, tiny_model: Models, tmp_path: Path
) -> None:
    flags = (
        tiny_model("llama"), "--context", 128, "--streams", 2, "--prompt", 64, "--fit", "2GiB", "--schemes", "W8A8",
        "--kv-cache", "none", "--profile", tmp_path / "profile.json",
    )  # fmt: skip
    status, report, _ = plan(*flags, "--run", tmp_path / "run", *SMALL)
    assert status == 0
    outcomes = {one["name"]: one for one in report["run"]["outcomes"]}
    assert outcomes["KV tokens"]["off"] == 0
    # Names in headers and JSON are counted, not their exact length.
    assert abs(outcomes["weights"]["predicted"] - outcomes["weights"]["measured"]) < 20_000
    assert outcomes["inter-token latency"]["predicted"] > 0
    # 0 where a busy machine reads several tokens at once.
    assert outcomes["inter-token latency"]["measured"] >= 0
    assert outcomes["mean KL"]["predicted"] is None
    manifest = read_manifest(tmp_path / "run" / "checkpoint")
    assert manifest is not None
    assert {module.scheme for module in manifest.modules} == {"W8A8"}
    again = plan(*flags)[1]["met"][0]  # from the profile
    assert again["itl_s"] == report["met"][0]["itl_s"]
