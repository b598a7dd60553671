"""Whole runs on tiny models: quantized, exported, reloaded by plain transformers, and equal to the walk."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit_core.cli import main
from lowbit_core.errors import OutputError
from lowbit_core.manifest import (
    MANIFEST_NAME,
    PROGRESS_NAME,
    Manifest,
    read_manifest,
    verify_files,
    write_manifest,
)
from lowbit_quantize.calibration import load_texts
from lowbit_quantize.cli import summary
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.recipe import Recipe, load_recipe

SMALL = (
    "calibration.sequences=16",
    "calibration.sequence_tokens=64",
    "quality.sequences=8",
    "quality.sequence_tokens=64",
)
CPU = torch.device("cpu")


def recipe_of(name: str = "awq-g64", *overrides: str) -> Recipe:
    return load_recipe(name, (*SMALL, *overrides))


def reloaded_kld(base: Path, checkpoint: Path, recipe: Recipe) -> float:
    """Mean KL on the recipe's held-out text, measured by plain transformers on both directories."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = load_texts(recipe.calibration, recipe.quality, tokenizer, 512)[1].ids
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in (base, checkpoint)]
    with torch.inference_mode():
        p, q = (torch.log_softmax(model(ids).logits[:, :-1].double(), -1) for model in models)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("method", ["awq", "gptq", "awq+gptq"])
def test_riding_along_measures_what_a_reload_measures(
    tiny_model: Callable[[str], Path], any_family: str, method: str, tmp_path: Path
) -> None:
    recipe = recipe_of("awq-g64", f"weights.method={method}", "kv_cache.dtype=none")
    manifest = quantize(str(tiny_model(any_family)), recipe, tmp_path / "out", CPU)
    assert reloaded_kld(tiny_model(any_family), tmp_path / "out", recipe) == pytest.approx(
        manifest.quality.mean_kld, abs=1e-3
    )
    assert manifest.quality.mean_kld > 1e-4
    assert manifest.kv_cache is None


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_asymmetric_grids_reload_too(
    tiny_model: Callable[[str], Path], family: str, method: str, tmp_path: Path
) -> None:
    recipe = recipe_of(
        "awq-g64", "weights.symmetric=false", f"weights.method={method}", "kv_cache.dtype=none"
    )
    manifest = quantize(str(tiny_model(family)), recipe, tmp_path / "out", CPU)
    assert reloaded_kld(tiny_model(family), tmp_path / "out", recipe) == pytest.approx(
        manifest.quality.mean_kld, abs=1e-3
    )


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("symmetric", ["true", "false"])
@pytest.mark.parametrize("bits", [4, 8])
def test_one_scale_for_each_output_channel_survives_a_reload(
    tiny_model: Callable[[str], Path], symmetric: str, bits: int, method: str, tmp_path: Path
) -> None:
    weights = {"group_size": "channel", "method": method, "bits": bits, "symmetric": symmetric}
    overrides = (f"weights.{key}={value}" for key, value in weights.items())
    recipe = recipe_of("awq-g64", *overrides, "kv_cache.dtype=none")
    manifest = quantize(str(tiny_model("llama")), recipe, tmp_path / "out", CPU)
    assert reloaded_kld(tiny_model("llama"), tmp_path / "out", recipe) == pytest.approx(
        manifest.quality.mean_kld, abs=1e-3
    )
    assert 0 < manifest.quality.mean_kld < (0.5 if bits == 4 else 0.01)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["strategy"] == "channel"
    assert {module.group_size for module in manifest.modules} == {None}


def test_awq_beats_round_to_nearest_and_eight_bits_beat_four(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    def kld(name: str, *overrides: str) -> float:
        out = tmp_path / "-".join((name, *overrides))
        return quantize(str(tiny_model("llama")), recipe_of(name, *overrides), out, CPU).quality.mean_kld

    awq, rtn, eight = kld("awq-g64"), kld("rtn-g64"), kld("awq-g64", "weights.bits=8")
    assert awq < rtn
    assert eight < 0.2 * awq


def test_the_checkpoint_says_what_it_is(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = quantize(str(tiny_model("qwen3")), recipe_of(), out, CPU)
    assert read_manifest(out) == manifest
    verify_files(out, manifest, hashes=True)
    assert not (out / PROGRESS_NAME).exists()
    assert {path.stat().st_mode & 0o444 for path in out.glob("*.safetensors")} == {0o444}  # for any user
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"], config["ignore"]) == (
        "compressed-tensors",
        "pack-quantized",
        ["lm_head"],
    )
    assert config["kv_cache_scheme"]["num_bits"] == 8
    assert len(manifest.modules) == 3 * 7
    assert manifest.size.linear_bits_per_weight < 4.4
    assert manifest.size.bytes < manifest.size.base_bytes
    assert manifest.size.base_bytes == 2 * manifest.size.parameters
    assert set(manifest.quality.domains) == {"code", "dialogue", "maths", "prose"}


def test_kv_scales_in_the_files_equal_the_manifests(
    tiny_model: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    manifest = quantize(str(tiny_model(family)), recipe_of(), tmp_path / "out", CPU)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert manifest.kv_cache is not None
    assert [layer.layer for layer in manifest.kv_cache.layers] == [0, 1, 2]
    for layer in manifest.kv_cache.layers:
        for name, value in (("k_scale", layer.k_scale), ("v_scale", layer.v_scale)):
            key = f"model.layers.{layer.layer}.self_attn.{name}"
            with safe_open(tmp_path / "out" / index[key], framework="pt") as file:
                assert file.get_tensor(key).tolist() == [value]


def test_no_method_leaves_every_weight_as_it_was(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = recipe_of("awq-g64", "weights.method=none", "kv_cache.dtype=none")
    manifest = quantize(str(tiny_model("llama")), recipe, tmp_path / "out", CPU)
    assert manifest.quality.mean_kld == pytest.approx(0, abs=1e-9)
    assert reloaded_kld(tiny_model("llama"), tmp_path / "out", recipe) == pytest.approx(0, abs=1e-9)


def test_fp8_keys_and_values_are_part_of_the_measured_quality(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = recipe_of("awq-g64", "weights.method=none")
    manifest = quantize(str(tiny_model("llama")), recipe, tmp_path / "out", CPU)
    assert manifest.quality.kv_cache_included
    assert 0 < manifest.quality.mean_kld < 0.1


def test_the_same_run_twice_gives_the_same_bytes(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    runs = [quantize(str(tiny_model("llama")), recipe_of(), tmp_path / name, CPU) for name in ("a", "b")]
    assert runs[0].files == runs[1].files


def test_an_ignored_linear_stays_and_so_does_its_group(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = recipe_of("awq-g64", r'weights.ignore=["re:.*layers\\.1\\..*k_proj"]', "kv_cache.dtype=none")
    manifest = quantize(str(tiny_model("llama")), recipe, tmp_path / "out", CPU)
    names = {module.name for module in manifest.modules}
    assert len(names) == 3 * 7 - 3
    assert "model.layers.1.self_attn.q_proj" not in names
    assert reloaded_kld(tiny_model("llama"), tmp_path / "out", recipe) == pytest.approx(
        manifest.quality.mean_kld, abs=1e-3
    )


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main(["quantize", *arguments])
    return status, json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_the_last_line_is_json_and_a_second_run_reuses_the_first(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [part for override in SMALL for part in ("--set", override)]
    arguments = [
        "--model",
        str(tiny_model("llama")),
        "--recipe",
        "awq-g64",
        "--out",
        str(tmp_path / "out"),
        *sets,
    ]
    status, result = run_cli(capsys, *arguments)
    assert status == 0
    assert set(result) >= {
        "checkpoint", "accepted", "base_bytes", "bytes", "seconds", "peak_rss_bytes",
        "mean_kld", "kld_stderr", "top1_agreement", "perplexity_base", "perplexity",
    }  # fmt: skip
    written = (tmp_path / "out" / MANIFEST_NAME).stat().st_mtime_ns
    assert run_cli(capsys, *arguments) == (0, result)
    assert (tmp_path / "out" / MANIFEST_NAME).stat().st_mtime_ns == written


def test_the_gate_rejects_with_status_three_and_says_so_in_the_manifest(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [part for override in (*SMALL, "quality.max_mean_kld=1e-6") for part in ("--set", override)]
    out = tmp_path / "out"
    status, result = run_cli(
        capsys, "--model", str(tiny_model("llama")), "--recipe", "awq-g64", "--out", str(out), *sets
    )
    manifest = read_manifest(out)
    assert (status, result["accepted"]) == (3, False)
    assert isinstance(manifest, Manifest)
    assert "max_mean_kld" in manifest.gate.reasons[0]


def test_a_damaged_checkpoint_is_not_called_done(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    quantize(str(tiny_model("llama")), recipe_of(), tmp_path / "out", CPU)
    next((tmp_path / "out").glob("model-00002*")).unlink()
    with pytest.raises(OutputError, match="damaged checkpoint"):
        quantize(str(tiny_model("llama")), recipe_of(), tmp_path / "out", CPU)


def test_a_changed_text_is_another_run(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    recipe = recipe_of("rtn-g64", f"calibration.source={path}", "calibration.sequences=1")
    path.write_text("one way to say it, " * 200)
    quantize(str(tiny_model("llama")), recipe, tmp_path / "out", CPU)
    path.write_text("another way to say it, " * 200)
    with pytest.raises(OutputError, match="another model, recipe or text"):
        quantize(str(tiny_model("llama")), recipe, tmp_path / "out", CPU)


def test_a_result_that_is_not_a_number_is_rejected_and_can_be_read(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    manifest = quantize(str(tiny_model("llama")), recipe_of(), tmp_path / "out", CPU)
    quality = manifest.quality.model_copy(update={"mean_kld": math.nan, "kld_stderr": math.inf})
    write_manifest(tmp_path / "out", manifest.model_copy(update={"quality": quality}))
    again = read_manifest(tmp_path / "out")
    assert again is not None
    assert math.isnan(again.quality.mean_kld)
    assert math.isinf(again.quality.kld_stderr)
    assert json.loads(json.dumps(summary(again, tmp_path), allow_nan=False))["mean_kld"] is None
