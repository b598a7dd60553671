"""Router distillation: a router is refitted where that lowers its block's error, and kept where held-out KL falls."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantize.layers.test_prune_experts import observed, pruned_only
from tests.quantize.small_runs import CPU, PLAIN_CACHE, recipe_of, reloaded_kld
from torch import Tensor

from lowbit_quantize.passes.distill_router import distill_router
from lowbit_quantize.passes.prune_experts import prune_layer
from lowbit_quantize.pipeline import quantize

DISTILLED = "passes=[{prune_experts: {prune_ratio: 0.5}}, distill_router]"


def test_a_distilled_router_lowers_the_error_of_its_block(
    tiny_model: Callable[[str], Path], moe_family: str
) -> None:
    decoder, layer, _, inputs = observed(tiny_model(moe_family))
    block: Any = layer.get_submodule(decoder.architecture.moe_block)
    inputs = inputs[:500]

    def routed() -> Tensor:
        with torch.no_grad():
            _, gates, chosen = block.gate(inputs)
            return block.experts(inputs, chosen, gates).clone()  # type: ignore[no-any-return]

    target = routed()
    prune_layer(layer, decoder.architecture, torch.tensor([0, 2, 4, 6]))
    before, weight = (routed() - target).float().square().sum(), block.gate.weight
    kept = distill_router(layer, decoder.architecture, inputs, target)
    after = (routed() - target).float().square().sum()
    assert block.gate.weight.dtype == weight.dtype
    assert after < before if kept else torch.equal(block.gate.weight, weight)


def test_distilled_routers_stay_only_where_they_lower_held_out_kl(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    base, recipe = tiny_model("qwen3_moe"), pruned_only(prune_ratio=0.5)
    plain = quantize(str(base), recipe, tmp_path / "plain", CPU)
    distilling = recipe_of("awq-g64", "modules=[]", PLAIN_CACHE, DISTILLED)
    manifest = quantize(str(base), distilling, tmp_path / "out", CPU)
    record = manifest.trial
    assert record is not None
    assert record.passes == ["distill_router"]
    assert record.kld_without == plain.quality.mean_kld
    assert record.kept == (record.kld_with < record.kld_without)
    assert manifest.quality.mean_kld == min(record.kld_with, record.kld_without)
    assert reloaded_kld(base, tmp_path / "out", recipe) == pytest.approx(manifest.quality.mean_kld, abs=1e-3)
    if not record.kept:
        assert manifest.files == plain.files
