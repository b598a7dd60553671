"""Every family: quantized, served by stock vLLM, its greedy texts those of the checkpoint in plain transformers.

The models are tiny and were taught four sentences by heart (tests/tiny_models.py). A random model's choices are near
ties, which the rounding of different kernels decides; theirs are logits apart, and still need attention, positions
and experts. Experts stay bfloat16, but in the last test: 4-bit ones need a processor with AMX, or AMD's zentorch.
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts.demo import LOWBIT
from tests.tiny_models import CONTEXT, SENTENCES, write_tiny_model

from lowbit_quantize.model.families import FACTS
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.recipe import load_recipe

pytestmark = pytest.mark.engine

CAN_RUN = "from lowbit_server.engine.vllm_engine import runs_quantized_experts as runs; print(runs(4, 64))"
SMALL = (
    "calibration.num_samples=16",  # of 4 texts of 64 tokens AWQ cannot tell what to make up for
    "calibration.max_seq_length=64",
    "quality.num_samples=2",
    "quality.max_seq_length=64",
)
PLAIN_EXPERTS = "modules=[{match: '*', scheme: W4A16, group_size: 64}, {match: '*.experts.*', scheme: none}]"
HEAD = (
    "modules=[{match: '*', scheme: W4A16, group_size: 64}, "
    "{match: lm_head, scheme: W4A16_ASYM, group_size: 64, methods: [awq, gptq]}]"
)
INT8 = "modules=[{match: '*', scheme: W8A8, methods: [smoothquant, gptq]}]"
HALF = ("passes=[{prune_experts: {prune_ratio: 0.5}}]", "modules=[]", "kv_cache.dtype=none")
# vLLM imports torchvision for Qwen3.5.
SERVED = [family for family in FACTS if family != "qwen3_5_text" or find_spec("torchvision")]
ROUTED = ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral", "deepseek_v2", "glm4_moe", "qwen3_next")
CASES: dict[str, tuple[str, ...]] = {
    **{family: ((PLAIN_EXPERTS,) if family in ROUTED else ()) for family in SERVED},
    "qwen2 head": (HEAD,),
    "qwen3 in int8": (INT8,),
    "gemma3_text windows": ("kv_cache.skip_layers=[sliding_window]",),
    "qwen3_moe pruned": HALF,
    "deepseek_v2 pruned": HALF,
}
# The engine's latent attention on a CPU caches in bfloat16 only; LFM2's has no place for scales.
NO_FP8 = ["deepseek_v2", "lfm2"]
# Median |log p(engine) - log p(transformers)| of a text's tokens that the kernels' rounding explains; up to 0.007 seen.
NOISE = 0.05
# Where quantization or pruning made it forget, a model may come to a choice nearer than what a rounding that flips one
# expert or one FP8 code moves (0.8 in log p seen): from there on two texts say nothing about each other.
TIE = 1.0  # logits


@dataclass(frozen=True)
class Served:
    """What the engine and plain transformers made of the same checkpoints."""

    engine: dict[str, Any]
    reference: dict[str, Any]


def checkpoint(root: Path, case: str) -> Path:
    """Teach, quantize and write one case."""
    family = case.split()[0]
    base = root / family
    if not base.exists():
        write_tiny_model(base, family, sentences=SENTENCES)
    kv = ("kv_cache.dtype=none",) if family in NO_FP8 else ()
    out = root / f"{case}, served"
    quantize(str(base), load_recipe("awq-g64", (*SMALL, *CASES[case], *kv)), out, torch.device("cpu"))
    return out


def greedy(what: str, directories: list[Path]) -> dict[str, Any]:
    """What `tests.e2e.greedy` prints, by directory."""
    command = [sys.executable, "-m", "tests.e2e.greedy", what, *map(str, directories)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=dict(os.environ))
    line = next(line for line in done.stdout.splitlines() if line.startswith("TEXTS "))
    found: dict[str, Any] = json.loads(line.removeprefix("TEXTS "))
    return found


def ask(what: str, directories: list[Path]) -> dict[str, Any]:
    """The same by case."""
    found = greedy(what, directories)
    return {case: found[str(directory)] for case, directory in zip(CASES, directories, strict=True)}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """All checkpoints, served one after another in one process, and reloaded in another."""
    root = tmp_path_factory.mktemp("families")
    directories = [checkpoint(root, case) for case in CASES]
    return Served(ask("engine", directories), ask("reference", directories))


def equal_up_to_near_ties(theirs: dict[str, Any], ours: dict[str, Any]) -> int:
    """Tokens before the reference's first near tie in each text, which must be the same in both."""
    tokens = 0
    for text, same, gaps in zip(theirs["texts"], ours["texts"], ours["gaps"], strict=True):
        clear = next((i for i, gap in enumerate(gaps) if gap < TIE), len(gaps))
        assert text[:clear] == same[:clear]
        tokens += clear
    return tokens


@pytest.mark.parametrize("case", CASES)
def test_stock_vllm_answers_as_the_reloaded_checkpoint_does(served: Served, case: str) -> None:
    ours, theirs = served.reference[case], served.engine[case]
    pairs = list(zip(theirs["texts"], ours["texts"], strict=True))
    clear = equal_up_to_near_ties(theirs, ours)
    apart = [
        abs(a - b)
        for (text, same), rows in zip(
            pairs, zip(theirs["logprobs"], ours["logprobs"], strict=True), strict=True
        )
        for a, b in zip(*rows, strict=True)
        if text == same
    ]
    print(
        f"{case}: {sum(a == b for a, b in pairs)} of {len(pairs)} texts equal, {clear} of "
        f"{sum(map(len, ours['texts']))} tokens before a near tie, "
        f"log p {statistics.median(apart):.4f} apart (median), cache {theirs['kv_cache_dtype']}, "
        f"{theirs['seconds']:.1f} s"
    )
    assert clear >= (0.5 if "pruned" in case else 0.8) * sum(map(len, ours["texts"]))
    assert statistics.median(apart) < NOISE


def test_nearly_all_texts_are_equal_to_the_last_token(served: Served) -> None:
    equal = [
        text == same
        for case, found in served.engine.items()
        for text, same in zip(found["texts"], served.reference[case]["texts"], strict=True)
    ]
    seconds = sum(found["seconds"] for found in served.engine.values())
    print(f"{sum(equal)} of {len(equal)} texts equal, {seconds:.0f} s of engines")
    assert sum(equal) >= 0.9 * len(equal)


def test_fp8_caches_were_in_use_where_the_engine_has_them(served: Served) -> None:
    for case, found in served.engine.items():
        fp8 = case not in NO_FP8 and "pruned" not in case
        assert found["kv_cache_dtype"].startswith("fp8" if fp8 else ("auto", "bfloat16")), case


def test_what_was_taught_is_still_said(served: Served) -> None:
    """The texts are sentences, not noise that happens to agree."""
    taught = SENTENCES[:, CONTEXT:].tolist()
    for case in ("llama", "qwen3", "olmo2"):
        right = sum(text == said for text, said in zip(taught, served.engine[case]["texts"], strict=True))
        assert right >= len(taught) // 2, case


def test_int4_experts_run_where_the_engine_has_a_kernel_and_are_refused_in_one_line_elsewhere(
    tmp_path: Path,
) -> None:
    """On this machine, whichever it is: either vLLM says that it can and answers, or one line, status 2."""
    base = write_tiny_model(tmp_path / "base", "qwen3_moe", sentences=SENTENCES)
    int4 = tmp_path / "int4"
    quantize(str(base), load_recipe("awq-gptq-g64", SMALL), int4, torch.device("cpu"))
    asked = subprocess.run([sys.executable, "-c", CAN_RUN], stdout=subprocess.PIPE, text=True, check=True)
    if asked.stdout.strip().endswith("True"):
        theirs, ours = (greedy(what, [int4])[str(int4)] for what in ("engine", "reference"))
        clear = equal_up_to_near_ties(theirs, ours)
        tokens = sum(map(len, ours["texts"]))
        print(f"4-bit experts on this processor: {clear} of {tokens} tokens before a near tie, all equal")
        assert clear >= 0.5 * tokens
        return
    done = subprocess.run([*LOWBIT, "serve", str(int4)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert "has 4-bit experts in groups of 64" in last
    assert "{match: '*.experts.*', scheme: none} in modules" in last
    assert "Traceback" not in done.stderr
    assert "starting vLLM" not in done.stderr


def test_int8_experts_are_refused_in_one_line_where_the_engine_has_no_kernel_for_them(tmp_path: Path) -> None:
    """Where it has one, benchmarks/schemes/agreement.py holds its text against transformers'."""
    asked = subprocess.run(
        [sys.executable, "-c", CAN_RUN.replace("runs(4, 64)", "runs(8, -1, 'int')")],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    if asked.stdout.strip().endswith("True"):
        pytest.skip("this processor has a kernel for int8 experts")
    base, int8 = write_tiny_model(tmp_path / "base", "qwen3_moe"), tmp_path / "int8"
    quantize(str(base), load_recipe("awq-g64", (*SMALL, INT8)), int8, torch.device("cpu"))
    done = subprocess.run([*LOWBIT, "serve", str(int8)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "has experts in int8 with their inputs" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert "starting vLLM" not in done.stderr
