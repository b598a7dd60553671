"""`--dry-run` predicts what a run then writes and needs, and says at which parallel sizes engines will take it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helm.test_deploy_doc import rows
from tests.quantize.small_runs import pruning, stored_bytes
from tests.quantize.stoppable import renaming, run
from tests.tiny_models import tiny_tokenizer
from transformers import LlamaConfig

from lowbit_core.cli import main
from lowbit_quantize.check import forecast
from lowbit_quantize.check.preflight import GIB, dry_run
from lowbit_quantize.check.sharding import obstacles
from lowbit_quantize.cli import GPU_MEMORY_GIB
from lowbit_quantize.model.reference import ModelReference, find_model
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.plan import Plan, make_plan
from lowbit_quantize.recipe import Recipe, load_recipe
from lowbit_quantize.run.directory import STATE
from lowbit_quantize.run.hidden_states import MEMORY_BYTES
from lowbit_quantize.schemes.integer import Integer
from lowbit_quantize.schemes.processors.experts import EXPERTS
from lowbit_quantize.schemes.processors.linears import LINEARS

SMALL = (
    "calibration.num_samples=4",
    "calibration.max_seq_length=64",
    "quality.num_samples=2",
    "quality.max_seq_length=64",
)


def recipe_of(name: str, *overrides: str) -> Recipe:
    return load_recipe(name, (*SMALL, *overrides))


@pytest.mark.parametrize(
    ("family", "recipe", "overrides"),
    [
        ("llama", "rtn-g64", ["modules.0.scheme=W4A16_ASYM"]),
        ("llama", "gptq-g64", ["modules.0.scheme=W8A16", "modules.0.group_size=channel", "kv_cache.dtype=none"]),
        ("qwen2", "rtn-g64", []),
        ("gemma3_text", "rtn-g64", ["modules.0.match=['*.mlp.*','*.0.self_attn.*']"]),
        ("qwen3_moe", "rtn-g64", [pruning(prune_ratio=0.5)]),
        ("deepseek_v2", "rtn-g64", [pruning(keep_experts=4)]),
        ("mixtral", "rtn-g64", ["modules=[]", "passes=[]"]),
    ],
)  # fmt: skip
def test_sizes_are_what_a_run_then_has(
    tiny_model: Callable[[str], Path], tmp_path: Path, family: str, recipe: str, overrides: list[str]
) -> None:
    model, wanted = str(tiny_model(family)), recipe_of(recipe, *overrides)
    report = dry_run(model, wanted, GPU_MEMORY_GIB, MEMORY_BYTES)
    manifest = quantize(model, wanted, tmp_path / "out", torch.device("cpu"))
    assert report["tensor_bytes"] == manifest.size.bytes == stored_bytes(tmp_path / "out")
    files = [path for path in (tmp_path / "out").iterdir() if ".safetensors" in path.name]
    assert report["checkpoint_bytes"] == pytest.approx(sum(path.stat().st_size for path in files), rel=0.01)
    assert report["parameters"] == manifest.size.parameters
    assert report["tensor_parallel"][0]["weights_bytes_per_rank"] == pytest.approx(
        manifest.size.bytes, rel=0.001
    )


@pytest.mark.parametrize("recipe", ["awq-g64", "gptq-g64"])
def test_the_streams_of_a_run_are_as_large_as_predicted_and_its_memory_is_below_the_bound(
    tiny_model: Callable[[str], Path], tmp_path: Path, recipe: str
) -> None:
    model, out, log = tiny_model("llama"), tmp_path / "out", tmp_path / "log"
    sets = [part for override in SMALL for part in ("--set", override)]
    command = ["quantize", "--model", str(model), "--recipe", recipe, "--out", str(out), *sets]
    assert run(command, log, kill_at=renaming("layer-00001.json"))[0] == -9
    report = dry_run(str(model), recipe_of(recipe), GPU_MEMORY_GIB, MEMORY_BYTES)
    header_bytes = 600
    saved = (out / STATE / "walk" / "streams-00000.safetensors").stat().st_size
    assert report["streams_bytes"] == pytest.approx(saved, abs=header_bytes)
    status, said = run(command, log)
    assert status == 0
    assert json.loads(said.splitlines()[-1])["peak_rss_bytes"] < report["memory_bound_bytes"]


def test_a_run_whose_streams_are_files_holds_three_generations_of_them(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Those that walk, those that the last finished layer left, and those of the layer that is being finished."""
    model, out = str(tiny_model("llama")), tmp_path / "out"
    sets = [part for override in SMALL for part in ("--set", override)]
    command = ["quantize", "--model", model, "--recipe", "gptq-g64", "--out", str(out), *sets]
    spilled = [*command, "--stream-memory-gib", "0"]
    assert run(spilled, tmp_path / "log", kill_at=renaming("streams-00001"))[0] == -9
    files = [path for path in (out / STATE).rglob("*") if "stream" in path.name]
    found = sum(path.stat().st_size for path in files)
    in_files, in_memory = (dry_run(model, recipe_of("gptq-g64"), 24.0, limit) for limit in (0, MEMORY_BYTES))
    streams = in_files["streams_bytes"]
    assert found == pytest.approx(3 * streams, rel=0.02)
    assert in_files["run_disk_bytes"] - in_memory["run_disk_bytes"] == streams
    assert in_files["run_disk_bytes"] > in_files["checkpoint_bytes"] + found


def test_a_pass_on_trial_takes_the_disk_of_two_results(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model, out = str(tiny_model("qwen3_moe")), tmp_path / "out"
    distilling = "passes=[{prune_experts: {prune_ratio: 0.5}}, distill_router, quantize]"
    sets = [part for override in (*SMALL, distilling) for part in ("--set", override)]
    command = ["quantize", "--model", model, "--recipe", "rtn-g64", "--out", str(out), *sets]
    at = renaming("walk/quality.json")
    assert run([*command, "--stream-memory-gib", "0"], tmp_path / "log", kill_at=at)[0] == -9
    shards = list(out.rglob("model-*.safetensors"))
    assert len(shards) == 2 * 3  # of each walk, a layer each; what lies outside the layers is written once
    kept = list((out / STATE / "without").rglob("*stream*"))
    assert not kept  # of the walk that has ended
    plain, doubled = (
        dry_run(model, recipe_of("rtn-g64", passes), 24.0, MEMORY_BYTES)
        for passes in (pruning(prune_ratio=0.5), distilling)
    )
    assert doubled["run_disk_bytes"] - plain["run_disk_bytes"] == plain["checkpoint_bytes"]
    assert sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) < doubled["run_disk_bytes"]


def plan_of(model: Path, *overrides: str, recipe: str = "rtn-g64") -> Plan:
    return make_plan(find_model(str(model)), recipe_of(recipe, *overrides))


def test_a_group_may_not_straddle_ranks_and_heads_must_divide(tiny_model: Callable[[str], Path]) -> None:
    """192 middle channels, 4 heads of which 2 hold keys and values."""
    plan = plan_of(tiny_model("llama"))
    assert obstacles(plan, "gpu", 1) == obstacles(plan, "cpu", 1) == []
    for kernel in ("gpu", "cpu"):
        assert obstacles(plan, kernel, 2) == [
            "mlp.down_proj: groups of 64 straddle ranks that hold 96 of 192 inputs"
        ]
        assert "4 attention heads do not divide by 8" in obstacles(plan, kernel, 8)
    narrow = plan_of(tiny_model("llama"), "modules.0.group_size=32")
    assert obstacles(narrow, "gpu", 2) == obstacles(narrow, "cpu", 2) == []
    assert obstacles(plan_of(tiny_model("llama"), "modules=[]", "passes=[]"), "cpu", 4) == []


def test_kernels_take_their_own_bits_and_groups(tiny_model: Callable[[str], Path]) -> None:
    llama = tiny_model("llama")
    assert obstacles(plan_of(llama, "modules.0.scheme=W8A16"), "gpu", 1) == []
    assert obstacles(plan_of(llama, "modules.0.scheme=W8A16"), "cpu", 1) == [
        "the CPU's kernel takes 4 bits, not 8 bits symmetric"
    ]
    asymmetric = Integer(8, 64, symmetric=False, name="no preset")
    assert asymmetric.obstacles("gpu") == []  # Humming's kernel takes what Marlin's does not
    assert obstacles(
        plan_of(llama, "modules.0.group_size=96", "modules.0.match='*.down_proj'"), "gpu", 1
    ) == ["Marlin takes groups of 32, 64, 128 or channels, not 96"]


def test_what_no_kernel_takes_is_said_of_each_scheme_of_a_mix(tiny_model: Callable[[str], Path]) -> None:
    down = "{match: '*.down_proj', scheme: W8A16, group_size: 64}"
    plan = plan_of(tiny_model("llama"), f"modules=[{{match: '*', scheme: W4A16, group_size: 32}}, {down}]")
    assert obstacles(plan, "gpu", 1) == []
    assert obstacles(plan, "gpu", 2) == [
        "mlp.down_proj: groups of 64 straddle ranks that hold 96 of 192 inputs"
    ]
    assert obstacles(plan, "cpu", 1) == ["the CPU's kernel takes 4 bits, not 8 bits symmetric"]


def test_experts_are_split_or_dealt_out_whole(tiny_model: Callable[[str], Path]) -> None:
    """6 experts of 64 middle channels: half an expert is too narrow for a kernel, three whole ones are not."""
    plan = plan_of(tiny_model("qwen3_moe"), pruning(keep_experts=6), "modules.0.group_size=32")
    assert obstacles(plan, "gpu", 2) == [
        "mlp.experts.*.gate_proj: Marlin's experts need middle channels of 64s on a rank, not 32",
        "mlp.experts.*.down_proj: Marlin's experts need middle channels of 64s on a rank, not 32",
    ]
    assert obstacles(plan, "gpu", 2, expert_parallel=True) == []
    assert "6 experts cannot be dealt evenly to 4 ranks" in obstacles(plan, "gpu", 4, expert_parallel=True)


@pytest.mark.parametrize("scheme", ["W8A8", "MXFP4"])
def test_routed_experts_have_a_line_of_their_own(tiny_model: Callable[[str], Path], scheme: str) -> None:
    """vLLM's kernels for them are others than for linears."""
    recipe = recipe_of("w8a8", f"modules.0.scheme={scheme}", "modules.0.methods=[rtn]")
    report = dry_run(str(tiny_model("qwen3_moe")), recipe, GPU_MEMORY_GIB, MEMORY_BYTES)
    (found,) = report["schemes"]
    assert found["experts"] == EXPERTS[scheme].words
    assert found["experts"] != LINEARS[scheme].words == f"{found['gpus']}; {found['cpus']}"
    (dense,) = dry_run(str(tiny_model("llama")), recipe, GPU_MEMORY_GIB, MEMORY_BYTES)["schemes"]
    assert dense["experts"] is None


def test_serving_figures_are_those_of_the_sizing_table(tmp_path: Path) -> None:
    """Llama-3.1-8B at 4 bits, from its configuration alone."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
    )
    config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    plan = make_plan(ModelReference("Llama-3.1-8B", "directory", tmp_path), recipe_of("awq"))
    row = next(row for row in rows() if row[0] == "Llama-3.1-8B" and row[6] == "4")
    assert forecast.rank_bytes(plan, 1) / GIB == pytest.approx(float(row[8]), abs=0.06)
    tokens = int(row[7].replace(",", ""))
    assert forecast.kv_bytes_per_token(plan, 1) * tokens / GIB == pytest.approx(float(row[9]), abs=0.06)
    for kernel in ("gpu", "cpu"):
        assert [obstacles(plan, kernel, size) for size in (1, 2, 4, 8)] == [[]] * 4
    needed = (float(row[8]) + float(row[9]) + 2) / 0.9
    assert forecast.kv_tokens(plan, 1, needed * GIB) == pytest.approx(tokens, rel=0.02)
    assert forecast.kv_tokens(plan, 1, 5 * GIB) == 0
    assert forecast.kv_bytes_per_token(plan, 8) * 8 == forecast.kv_bytes_per_token(plan, 1)


def checked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["quantize", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_writes_nothing_and_its_last_line_is_json(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--model", str(tiny_model("llama")), "--recipe", "gptq-g64", "--dry-run"]
    sets = [part for override in SMALL for part in ("--set", override)]
    status, out, err = checked(capsys, *base, *sets, "--out", str(tmp_path / "out"), "--gpu-memory-gib", "24")
    report: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert status == 0
    assert not (tmp_path / "out").exists()
    assert [row["ranks"] for row in report["tensor_parallel"]] == [1, 2, 4, 8]
    assert "straddle" in err
    assert checked(capsys, *base[:-1], "--gpu-memory-gib", "24", "--out", str(tmp_path / "out"))[0] == 2
    status, out, err = checked(capsys, *base, *sets, "--set", "modules.0.group_size=128")
    assert (status, out) == (2, "")
    assert "groups of 128 do not divide them" in err
