"""Whole runs on tiny models: quantized, exported, reloaded by plain transformers, and equal to the walk."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tests.page_checks import check_page
from tests.quantize.conftest import KINDS
from tests.quantize.small_runs import (
    CPU,
    PLAIN_CACHE,
    PLAIN_WEIGHTS,
    SMALL_FLAGS,
    calibration_ids,
    recipe_of,
    recipe_with,
    reloaded_kld,
    set_aside_ids,
)

from lowbit_core.checkpoint_page.page import as_html
from lowbit_core.cli import main
from lowbit_core.errors import OutputError
from lowbit_core.manifest import MANIFEST_NAME, PROGRESS_NAME, Manifest, read_manifest, write_manifest
from lowbit_core.manifest_files import verify_files
from lowbit_core.module_groups import module_groups
from lowbit_quantize.cli import summary
from lowbit_quantize.pipeline import quantize

# One whole run for each kind of family; between them every method, and zero points where engines take them.
RUNS: dict[str, dict[str, Any]] = {
    "llama": {"scheme": "W4A16", "methods": ["gptq"]},
    "phi3": {"scheme": "W4A16_ASYM", "methods": ["awq", "gptq"]},
    "gemma3_text": {"scheme": "W4A16", "methods": ["awq"]},
    "olmo2": {"scheme": "W4A16_ASYM", "methods": ["gptq"]},
    "qwen3_moe": {"scheme": "W4A16", "methods": ["awq", "gptq"]},
    "qwen2_moe": {"scheme": "W4A16", "methods": ["awq"]},
    "deepseek_v2": {"scheme": "W4A16", "methods": ["gptq"]},
}


def test_quality_of_the_walk_is_what_a_reload_measures(
    tiny_model: Callable[[str], Path], kind: str, tmp_path: Path
) -> None:
    recipe = recipe_with({"match": "*", "group_size": 64, **RUNS[kind]})
    manifest = quantize(str(tiny_model(kind)), recipe, tmp_path / "out", CPU)
    assert reloaded_kld(tiny_model(kind), tmp_path / "out", recipe) == pytest.approx(
        manifest.quality.mean_kld, abs=1e-3
    )
    assert manifest.quality.mean_kld > 1e-4
    aside = manifest.quality.set_aside
    assert aside is not None
    ids = set_aside_ids(tiny_model(kind), recipe)
    assert len(ids) == aside.sequences == 4
    assert reloaded_kld(tiny_model(kind), tmp_path / "out", recipe, ids) == pytest.approx(
        aside.mean_kld, abs=1e-3
    )
    seen = manifest.quality.calibration
    assert (seen is not None) == bool(
        {"awq", "gptq"} & set(RUNS[kind]["methods"])
    )  # the base's text walks for these
    if seen:
        ids = calibration_ids(tiny_model(kind), recipe)
        assert reloaded_kld(tiny_model(kind), tmp_path / "out", recipe, ids) == pytest.approx(
            seen.mean_kld, abs=1e-3
        )
        assert manifest.quality.overfitting == aside.mean_kld / seen.mean_kld
    assert manifest.kv_cache is None
    assert {module.scheme for module in manifest.modules} == {RUNS[kind]["scheme"]}


def test_there_is_a_run_for_every_kind() -> None:
    assert set(RUNS) == set(KINDS)


@pytest.mark.parametrize(
    ("scheme", "method", "limit"),
    [("W4A16_ASYM", "gptq", 0.5), ("W4A16", "awq", 0.5), ("W8A16", "rtn", 0.01)],
)
def test_one_scale_for_each_output_channel_survives_a_reload(
    tiny_model: Callable[[str], Path], scheme: str, method: str, limit: float, tmp_path: Path
) -> None:
    recipe = recipe_with({"match": "*", "scheme": scheme, "group_size": "channel", "methods": method})
    manifest = quantize(str(tiny_model("llama")), recipe, tmp_path / "out", CPU)
    assert reloaded_kld(tiny_model("llama"), tmp_path / "out", recipe) == pytest.approx(
        manifest.quality.mean_kld, abs=1e-3
    )
    assert 0 < manifest.quality.mean_kld < limit
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["strategy"] == "channel"
    assert {module.group_size for module in manifest.modules} == {None}


def test_awq_beats_round_to_nearest_and_eight_bits_beat_four(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    def kld(name: str, *overrides: str) -> float:
        out = tmp_path / "-".join((name, *overrides))
        return quantize(str(tiny_model("llama")), recipe_of(name, *overrides), out, CPU).quality.mean_kld

    awq, rtn, eight = kld("awq-g64"), kld("rtn-g64"), kld("awq-g64", "modules.0.scheme=W8A16")
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
    assert manifest.unquantized == []
    assert {(m.scheme, m.bits, m.group_size, tuple(m.methods)) for m in manifest.modules} == {
        ("W4A16", 4, 64, ("awq",))
    }
    assert manifest.size.linear_bits_per_weight < 4.4
    assert manifest.size.bytes < manifest.size.base_bytes
    assert manifest.size.base_bytes == 2 * manifest.size.parameters
    assert set(manifest.quality.domains) == {"code", "dialogue", "maths", "prose"}


def test_the_manifest_says_where_time_and_bytes_went_and_how_much_experts_mattered(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    passes = [{"prune_experts": {"keep_experts": 4}}, "quantize"]
    rule = {"match": "*", "scheme": "W4A16", "group_size": 64, "methods": ["gptq"]}
    manifest = quantize(str(tiny_model("qwen3_moe")), recipe_with(rule, passes=passes), tmp_path / "out", CPU)
    run, size, experts = manifest.run, manifest.size, manifest.experts
    assert sum(run.phases_s.values()) == pytest.approx(run.seconds, abs=0.1)
    assert {"prepare", "prune_experts", "observe", "quantize", "experts", "compare"} <= run.phases_s.keys()
    assert sum(module.weights or 0 for module in manifest.modules) == size.quantized_parameters
    assert module_groups(manifest)[0].bits_per_weight == pytest.approx(size.linear_bits_per_weight, abs=1e-4)
    assert experts is not None
    for layer, kept in experts.kept_by_layer.items():
        scores = experts.saliency_by_layer[layer]
        assert len(scores) == len(experts.tokens_by_layer[layer]) == 8
        assert min(scores[one] for one in kept) >= max(scores[one] for one in {*range(8)} - {*kept})
    gates = {name for name, reason in manifest.unquantized_because.items() if "router" in reason}
    assert gates == {f"model.layers.{layer}.mlp.gate" for layer in experts.kept_by_layer}
    check_page(as_html(manifest, "out"))


@pytest.mark.parametrize("family", ["qwen3", "phi3", "gemma3_text"])
def test_kv_scales_in_the_files_equal_the_manifests(
    tiny_model: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    manifest = quantize(str(tiny_model(family)), recipe_of("rtn-g64"), tmp_path / "out", CPU)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert manifest.kv_cache is not None
    assert [layer.layer for layer in manifest.kv_cache.layers] == [0, 1, 2]
    for layer in manifest.kv_cache.layers:
        for name, value in (("k_scale", layer.k_scale), ("v_scale", layer.v_scale)):
            key = f"model.layers.{layer.layer}.self_attn.{name}"
            with safe_open(tmp_path / "out" / index[key], framework="pt") as file:
                assert file.get_tensor(key).tolist() == [value]


def test_no_rule_leaves_every_weight_as_it_was(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = recipe_of("awq-g64", *PLAIN_WEIGHTS, PLAIN_CACHE)
    manifest = quantize(str(tiny_model("llama")), recipe, tmp_path / "out", CPU)
    assert manifest.quality.mean_kld == pytest.approx(0, abs=1e-9)
    assert reloaded_kld(tiny_model("llama"), tmp_path / "out", recipe) == pytest.approx(0, abs=1e-9)


def test_fp8_keys_and_values_are_part_of_the_measured_quality(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = recipe_of("awq-g64", *PLAIN_WEIGHTS)
    manifest = quantize(str(tiny_model("llama")), recipe, tmp_path / "out", CPU)
    assert manifest.quality.kv_cache_included
    assert 0 < manifest.quality.mean_kld < 0.1


def test_the_same_run_twice_gives_the_same_bytes(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    runs = [quantize(str(tiny_model("llama")), recipe_of(), tmp_path / name, CPU) for name in ("a", "b")]
    assert runs[0].files == runs[1].files


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main(["quantize", *arguments])
    return status, json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_the_last_line_is_json_and_a_second_run_reuses_the_first(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(tiny_model("llama")), str(tmp_path / "out")
    arguments = ["--model", model, "--recipe", "awq-g64", "--out", out, *SMALL_FLAGS]
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
    model, out = str(tiny_model("llama")), tmp_path / "out"
    limit = ("--set", "quality.max_mean_kld=1e-6")
    status, result = run_cli(
        capsys, "--model", model, "--recipe", "rtn-g64", "--out", str(out), *SMALL_FLAGS, *limit
    )
    manifest = read_manifest(out)
    assert (status, result["accepted"]) == (3, False)
    assert isinstance(manifest, Manifest)
    assert "max_mean_kld" in manifest.gate.reasons[0]


def test_a_damaged_checkpoint_is_not_called_done(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    quantize(str(tiny_model("llama")), recipe_of("rtn-g64"), tmp_path / "out", CPU)
    next((tmp_path / "out").glob("model-00002*")).unlink()
    with pytest.raises(OutputError, match="damaged checkpoint"):
        quantize(str(tiny_model("llama")), recipe_of("rtn-g64"), tmp_path / "out", CPU)


def test_a_result_that_is_not_a_number_is_rejected_and_can_be_read(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    manifest = quantize(str(tiny_model("llama")), recipe_of("rtn-g64"), tmp_path / "out", CPU)
    quality = manifest.quality.model_copy(update={"mean_kld": math.nan, "kld_stderr": math.inf})
    write_manifest(tmp_path / "out", manifest.model_copy(update={"quality": quality}))
    again = read_manifest(tmp_path / "out")
    assert again is not None
    assert math.isnan(again.quality.mean_kld)
    assert math.isinf(again.quality.kld_stderr)
    assert json.loads(json.dumps(summary(again, tmp_path), allow_nan=False))["mean_kld"] is None
