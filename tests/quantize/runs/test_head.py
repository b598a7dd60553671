"""The output matrix, quantized where a rule names it: measured as it is served, or refused where no engine reads it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantize.edited_bases import edited
from tests.quantize.small_runs import (
    CPU,
    PLAIN_EXPERTS,
    SMALL_FLAGS,
    recipe_with,
    reloaded_kld,
    stored_bytes,
    tensors_of,
)
from tests.quantize.stoppable import renaming, run
from tests.tiny_models import write_tiny_model
from torch import nn

from lowbit_core.errors import RecipeError
from lowbit_quantize.catalog import CATALOG
from lowbit_quantize.check.forecast import tensor_bytes
from lowbit_quantize.check.sharding import obstacles
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.plan import Plan, make_plan
from lowbit_quantize.quality.kl import compare
from lowbit_quantize.walk.head import QuantizedHead, quantize_head
from lowbit_quantize.walk.module_plan import ModulePlan

LAYERS = {"match": "*", "scheme": "W4A16", "group_size": 64, "methods": ["rtn"]}
HEAD = {"match": "lm_head", "scheme": "W4A16", "group_size": 32, "methods": ["awq", "gptq"]}
METHODS = {method.name: method for method in CATALOG.methods}
SCHEMES = {preset.name: preset for preset in CATALOG.presets}


def plan_of(model: Path, *rules: dict[str, Any]) -> Plan:
    return make_plan(find_model(str(model)), recipe_with(*rules))


@pytest.mark.parametrize(
    ("family", "rules"),
    [
        ("qwen2", (LAYERS, HEAD)),
        ("olmo2", ({**HEAD, "scheme": "W4A16_ASYM", "methods": ["awq"]},)),
        ("qwen3_moe", (LAYERS, PLAIN_EXPERTS, {**HEAD, "scheme": "W8A16", "methods": ["gptq"]})),
    ],
)
def test_what_transformers_opens_is_what_was_measured(
    tiny_model: Callable[[str], Path], tmp_path: Path, family: str, rules: tuple[dict[str, Any], ...]
) -> None:
    recipe, out = recipe_with(*rules), tmp_path / "out"
    base = tiny_model(family)
    manifest = quantize(str(base), recipe, out, CPU)
    assert reloaded_kld(base, out, recipe) == pytest.approx(manifest.quality.mean_kld, abs=2e-3)
    assert manifest.modules[-1].name == "lm_head"
    assert manifest.modules[-1].scheme == rules[-1]["scheme"]
    assert manifest.size.bytes == stored_bytes(out) == tensor_bytes(plan_of(base, *rules))
    assert "lm_head.weight" not in tensors_of(out)


def test_a_draft_layer_beside_the_model_reads_the_norm_that_it_did(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    def with_draft(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "mtp.fc.weight": torch.ones(8, 8)}

    base = edited(tiny_model("qwen2"), tmp_path / "base", with_draft)
    quantize(str(base), recipe_with(HEAD), tmp_path / "out", CPU)
    before, after = (tensors_of(path)["model.norm.weight"] for path in (base, tmp_path / "out"))
    assert torch.equal(before, after)
    alone = edited(tiny_model("qwen2"), tmp_path / "alone")
    quantize(str(alone), recipe_with(HEAD), tmp_path / "folded", CPU)
    assert not torch.equal(before, tensors_of(tmp_path / "folded")["model.norm.weight"])


def test_a_run_that_was_killed_beside_the_head_ends_with_the_same_files(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Before the comparison is recorded, with which the head is, and after."""
    rules = json.dumps([LAYERS, HEAD])
    sets = ("--set", f"modules={rules}", *SMALL_FLAGS)

    def command(out: str) -> list[str]:
        model = str(tiny_model("qwen2"))
        return ["quantize", "--model", model, "--recipe", "rtn-g64", "--out", str(tmp_path / out), *sets]

    log = tmp_path / "log"
    assert run(command("whole"), log)[0] == 0
    for point in (renaming("quality.json"), renaming("model-00005-of-00005")):
        assert run(command("out"), log, kill_at=point)[0] == -9
    assert run(command("out"), log)[0] == 0
    whole, out = (tensors_of(tmp_path / name) for name in ("whole", "out"))
    assert whole.keys() == out.keys()
    assert all(torch.equal(tensor, out[name]) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("rules", "quantized"),
    [
        ((LAYERS,), False),
        ((LAYERS, HEAD), True),
        ((HEAD, LAYERS), True),
        ((LAYERS, {**HEAD, "match": "*head"}), True),
        ((LAYERS, {**HEAD, "match": "re:lm_"}), True),
        ((LAYERS, HEAD, {"match": "*", "scheme": "none"}, {**LAYERS, "match": "*.o_proj"}), False),
        (({**LAYERS, "match": ["*", "lm_head"]},), True),
    ],
)
def test_only_a_pattern_that_names_it_means_the_head(
    tiny_model: Callable[[str], Path], rules: tuple[dict[str, Any], ...], quantized: bool
) -> None:
    plan = plan_of(tiny_model("qwen2"), *rules)
    assert plan.quantizes_head is quantized
    assert ("lm_head" in plan.unquantized) is not quantized


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("llama", "lm_head", "'lm_head' matches lm_head only, which is model.embed_tokens, which engines look rows up"),
        ("llama", "*embed_tokens", "matches model.embed_tokens only, which engines look rows up in: vLLM 0.32 reads"),
        ("qwen2", "model.embed_tokens", "give it scheme: none or leave the rule out"),
    ],
)  # fmt: skip
def test_what_no_engine_reads_so_is_refused_with_the_reason(
    tiny_model: Callable[[str], Path], family: str, name: str, message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_of(tiny_model(family), LAYERS, {**HEAD, "match": name})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_zero_points_of_a_vocabulary_that_fills_no_words_are_refused(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "odd", "qwen2", vocab_size=514)
    plan_of(base, HEAD)
    with pytest.raises(RecipeError, match="W4A16_ASYM does not fit the 514 outputs of lm_head"):
        plan_of(base, {**HEAD, "scheme": "W4A16_ASYM"})


def test_engines_fill_up_a_vocabulary_before_they_share_it(tmp_path: Path) -> None:
    plan = plan_of(write_tiny_model(tmp_path / "odd", "qwen2", vocab_size=514), HEAD)
    assert not [one for one in obstacles(plan, "cpu", 2) if "lm_head" in one]
    assert any("lm_head: 72 x 128" in one for one in obstacles(plan, "cpu", 8))


@pytest.mark.parametrize("methods", [("rtn",), ("awq",), ("gptq",), ("awq", "gptq")])
def test_blocks_of_rows_change_nothing(methods: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(100, 64, generator=generator).bfloat16()
    states = torch.randn(4, 32, 64, generator=generator).bfloat16()
    entry = ModulePlan(SCHEMES["W4A16"].make(32), tuple(METHODS[name] for name in methods))

    def quantized(block_bytes: int) -> QuantizedHead:
        norm = nn.RMSNorm(64, eps=1e-6, dtype=torch.bfloat16).requires_grad_(False)
        return quantize_head(norm, weight, entry, states, 0.0, fold=True, block_bytes=block_bytes)

    whole, pieces = quantized(1 << 20), quantized(1)
    assert all(torch.equal(whole.tensors[name], pieces.tensors[name]) for name in whole.tensors)
    assert torch.equal(whole.weight, pieces.weight)
    assert whole.error == pytest.approx(pieces.error, rel=1e-4)


def test_two_heads_are_compared_by_the_plain_formula() -> None:
    generator = torch.Generator().manual_seed(4)
    base, ours = (torch.randn(2, 20, 16, generator=generator) for _ in range(2))
    head, own = (torch.randn(1100, 16, generator=generator) for _ in range(2))
    same, ids = nn.Identity(), torch.randint(0, 1100, (2, 20), generator=generator)
    found = compare(base, ours, same, same, head, ids, own)
    p, q = (
        torch.log_softmax((states[:, :-1] @ matrix.T).double(), -1)
        for states, matrix in ((base, head), (ours, own))
    )
    torch.testing.assert_close(found.kld, (p.exp() * (p - q)).sum(-1), rtol=1e-3, atol=1e-5)
