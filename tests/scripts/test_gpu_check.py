"""scripts/gpu-check on the CPU: every section runs; its budget, its clock and its table of seams do what they say."""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import kernels, seams
from benchmarks.gpu.place import Place, Spent
from benchmarks.gpu.report import Found, Report, Section

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu-check"
HAS_VLLM = find_spec("vllm") is not None
PLACE = Place(torch.device("cpu"), tiny=False)


def test_every_section_passes_on_the_cpu(tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    command = [str(SCRIPT), "--device", "cpu", "--tiny"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert {name: section["status"] for name, section in sections.items()} == {
        "machine": "passed",
        "Hessian": "passed",
        "the kernels of W4A16": "passed",
        "the kernels of FP8_BLOCK": "passed"
        if torch.cpu._is_amx_tile_supported() and HAS_VLLM
        else "skipped",
        "the kernels of NVFP4A16": "skipped",
        "qwen3_moe by gptq-g64": "passed",
        "a layer of Llama-3.1-8B": "passed",
        "a layer of Qwen3-30B-A3B": "passed",
        "an expert of Qwen3-30B-A3B": "passed",
        "an expert of DeepSeek-V3 671B": "passed",
        "operations of an expert": "passed",
    }
    ours = sections["the kernels of W4A16"]
    assert ours["torch"]["relative_error"] < 5e-3
    assert not HAS_VLLM or ours["vLLM"]["relative_error"] < 5e-3
    assert all(maker in sections["the kernels of NVFP4A16"]["why"] for maker in ("torch:", "vLLM:"))
    parts = sections["an expert of Qwen3-30B-A3B"]["blocks for a GPU"]["ms"]
    assert parts["all"] == pytest.approx(
        sum(taken for part, taken in parts.items() if part != "all"), abs=0.1
    )
    causes = sections["a layer of Qwen3-30B-A3B"]["seconds_a_layer"]
    assert set(causes) == {"all", *seams.RUN_CAUSES.values()} - {"quality"}


def test_a_section_that_fails_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    report = Report(tmp_path / "gpu.json", budget_s=60)
    for section in (
        Section("raises", 1, lambda _: Found({"never": 1 / 0})),
        Section("finds a fault", 1, lambda _: Found({"kld": 9}, ("a KL of 9",))),
        Section("passes", 1, lambda _: Found({"kld": 0})),
    ):
        report.run(section, PLACE)
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert report.failed == ["raises", "finds a fault"]
    assert "ZeroDivisionError" in sections["raises"]["error"]
    assert sections["finds a fault"]["wrong"] == ["a KL of 9"]
    assert sections["passes"]["kld"] == 0


def test_a_section_that_has_nothing_to_find_says_why_and_is_no_failure(tmp_path: Path) -> None:
    report = Report(tmp_path / "gpu.json", budget_s=60)
    report.run(Section("nothing", 1, lambda _: Found({}, skipped="no kernel here")), PLACE)
    section = json.loads((tmp_path / "gpu.json").read_text())["sections"]["nothing"]
    assert (section["status"], section["why"], report.failed) == ("skipped", "no kernel here", [])


@pytest.mark.parametrize("name", ["W4A16", "FP8_BLOCK", "NVFP4A16"])
def test_a_kernel_that_reads_a_layout_otherwise_is_off(name: str) -> None:
    def reversed_columns(linear: Any, read: torch.Tensor) -> torch.Tensor:
        return seams.product(linear, read.flip(-1))

    section = kernels.kernel(name, {"torch": seams.product, "other": reversed_columns})
    found = section(Place(torch.device("cpu"), tiny=True))
    assert found.values["torch"]["relative_error"] == 0
    assert found.wrong == (f"other's kernel is off by {found.values['other']['relative_error']:.1e}",)


def test_a_section_that_does_not_fit_the_budget_is_skipped_and_one_that_outlasts_it_is_stopped(
    tmp_path: Path,
) -> None:
    def sleep(_: Place) -> Found:
        time.sleep(30)
        return Found({})

    report = Report(tmp_path / "gpu.json", budget_s=0.3)
    report.run(Section("long", 60, lambda _: Found({})), PLACE)
    report.run(Section("longer than it said", 0.1, sleep), PLACE)
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert sections["long"]["status"] == "skipped"
    assert "OutOfTime" in sections["longer than it said"]["error"]
    assert sections["longer than it said"]["seconds"] < 5


def test_seconds_of_nested_causes_add_up_to_the_whole() -> None:
    spent, start_s = Spent(PLACE), time.perf_counter()
    with spent.on("outer"):
        time.sleep(0.02)
        with spent.on("inner"):
            time.sleep(0.05)
        time.sleep(0.02)
    assert spent.seconds["inner"] >= 0.05
    assert 0.04 <= sum(spent.seconds.values()) <= time.perf_counter() - start_s


@pytest.mark.parametrize(
    "gone", ["lowbit_quantize.methods.gptq:no_such_part", "lowbit_quantize.no_such_room:part"]
)
def test_a_function_that_has_moved_is_named(gone: str) -> None:
    with (
        pytest.raises(LookupError, match=rf"{gone}.*benchmarks/gpu/seams.py"),
        seams.timed({gone: "gone"}, Spent(PLACE)),
    ):
        pass
