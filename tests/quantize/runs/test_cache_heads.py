"""An FP8 cache with a scale for each head."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tests.quantize.small_runs import (
    CPU,
    PLAIN_WEIGHTS,
    heldout_ids,
    mean_kld,
    recipe_of,
    stored_bytes,
    tensors_of,
)
from transformers import AutoModelForCausalLM

from lowbit_core.errors import CheckpointError, RecipeError
from lowbit_core.inspection import describe
from lowbit_core.manifest import read_manifest
from lowbit_evaluate.loaded_model import load_model
from lowbit_quantize.check.preflight import dry_run, table
from lowbit_quantize.export.exporter import export
from lowbit_quantize.export.modelopt import ModelOpt
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.schemes.kv_cache import KVScales

BY_HEAD = "kv_cache={dtype: fp8, strategy: attn_head}"


def printed(shown: object) -> str:
    console = Console(width=300, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(shown)
    return console.export_text()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_each_head_has_a_scale_in_the_files_the_manifest_and_the_configuration(
    tiny_model: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    base, out, recipe = (
        tiny_model(family),
        tmp_path / "out",
        recipe_of("rtn-g64", BY_HEAD, "quality.isolate=true"),
    )
    report = dry_run(str(base), recipe, 24.0, 1 << 30)
    manifest = quantize(str(base), recipe, out, CPU)
    assert report["tensor_bytes"] == manifest.size.bytes == stored_bytes(out)
    kv, tensors = manifest.kv_cache, tensors_of(out)
    assert kv
    assert kv.strategy == "attn_head"
    heads = json.loads((out / "config.json").read_text())["num_key_value_heads"]
    assert len(kv.layers) == 3
    for layer in kv.layers:
        for side, scales in (("k", layer.k_scale), ("v", layer.v_scale)):
            stored = tensors[f"model.layers.{layer.layer}.self_attn.{side}_scale"]
            assert tuple(stored.shape) == (heads, 1, 1)
            assert tuple(stored.flatten().tolist()) == scales
    assert (
        json.loads((out / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]["strategy"]
        == "attn_head"
    )
    assert manifest.quality.kv_cache_alone
    assert manifest.quality.kv_cache_alone.mean_kld > 0
    assert read_manifest(out) == manifest
    assert "a scale for each head" in printed(describe(manifest, verified=False))
    words = "NVIDIA's from 9.0 (Hopper) on, with FlashAttention 3 or later; no CPU"
    assert words in printed(table(report))


def test_a_checkpoint_is_opened_with_the_scale_of_each_head(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    base, out = tiny_model("llama"), tmp_path / "out"
    recipe = recipe_of("rtn-g64", *PLAIN_WEIGHTS, BY_HEAD)
    manifest = quantize(str(base), recipe, out, CPU)
    opened = load_model(find_model(str(out)), CPU)
    assert all(isinstance(scales.k_scale, tuple) for scales in opened.scales.values())
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    kld = mean_kld(before, opened.model, heldout_ids(base, recipe))
    assert kld == pytest.approx(manifest.quality.mean_kld, rel=0.05, abs=1e-5)
    (out / "lowbit.json").unlink()
    again = load_model(find_model(str(out)), CPU).scales
    assert again == {layer: KVScales(one.k_scale, one.v_scale) for layer, one in opened.scales.items()}


def test_what_has_one_scale_a_layer_says_so(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = recipe_of("fp8-dynamic", BY_HEAD)
    quantize(str(tiny_model("llama")), recipe, tmp_path / "out", CPU)
    with pytest.raises(CheckpointError, match="not of each head"):
        export(tmp_path / "out", ModelOpt(), tmp_path / "exported")
    with pytest.raises(RecipeError, match="strategy attn_head goes with dtype fp8"):
        recipe_of("rtn-g64", "kv_cache={dtype: none, strategy: attn_head}")
