"""`lowbit sensitivity` and `lowbit allocate` from flags to files, what runs make of recipes, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.page_checks import check_page
from tests.quantize.small_runs import SMALL_FLAGS, stored_bytes

from lowbit_core.cli import Command, Parser
from lowbit_core.errors import InputError
from lowbit_core.manifest import read_manifest
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.recipe import Recipe, load_recipe
from lowbit_quantize.sensitivity.assignment import Assignment, best, of_checkpoint, uniform
from lowbit_quantize.sensitivity.cli import allocate_command, sensitivity_command, size_of
from lowbit_quantize.sensitivity.recipe_file import recipe_text
from lowbit_quantize.sensitivity.report import Sensitivity, read_sensitivity

CPU = torch.device("cpu")
FLAGS = (*SMALL_FLAGS, "--set", "modules.0.group_size=32", "--set", "kv_cache.dtype=none", "--tokens", "512")


def run(command: Command, *arguments: str | Path) -> int:
    """As `main` runs it, errors raised."""
    parser = Parser(prog="lowbit")
    command.add_arguments(parser)
    return command.run(parser.read([str(one) for one in arguments]))


@pytest.fixture(scope="session")
def measured(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of sensitivities of a dense model and of a mixture."""
    found = {}
    for family in ("llama", "qwen3_moe"):
        out = tmp_path_factory.mktemp("sensitivity") / f"{family}.json"
        names = "W4A16,W8A8,W3A16,none"
        assert run(sensitivity_command, tiny_model(family), "--candidates", names, *FLAGS, "--out", out) == 0
        found[family] = out
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_budget_becomes_a_recipe_and_a_checkpoint_of_that_size(
    measured: dict[str, Path],
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    family: str,
) -> None:
    file, recipe_file = tmp_path / "copy.json", tmp_path / "mixed.yaml"
    file.write_text(measured[family].read_text())
    capsys.readouterr()
    assert run(allocate_command, file, "--bits", "5", "--out", recipe_file) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["bits"] <= 5
    assert len(report["decisions"]) > 1
    found = read_sensitivity(file)
    assert report["predicted_kl"] < uniform(found, "W4A16").kl

    recipe = load_recipe(str(recipe_file))
    manifest = quantize(str(tiny_model(family)), recipe, tmp_path / "out", CPU)
    assert stored_bytes(tmp_path / "out") == report["bytes"]
    again, _ = of_checkpoint(found, tmp_path / "out")
    assert again.counts == report["decisions"]
    assert again.kl == pytest.approx(report["predicted_kl"])
    if family == "llama":
        assert not any("lm_head" in record.name for record in manifest.modules)


def test_bytes_bound_the_whole_checkpoint(measured: dict[str, Path]) -> None:
    found = read_sensitivity(measured["qwen3_moe"])
    names = [one.name for one in found.candidates]
    least, most = uniform(found, "W3A16").bytes, uniform(found, "W8A8").bytes
    previous = float("inf")
    for size in torch.linspace(least, most, 6).tolist():
        one = best(found, names, most_bytes=size)
        assert one.bytes <= size
        assert one.kl <= previous
        previous = one.kl
    with_head = best(found, names, most_bytes=least, head=True)
    assert with_head.bytes <= least
    assert with_head.kl < best(found, names, most_bytes=least).kl


def test_what_was_measured_corrects_what_is_predicted(
    measured: dict[str, Path],
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = measured["llama"]
    assert run(allocate_command, file, "--bits", "6", "--out", tmp_path / "one.yaml") == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    quantize(str(tiny_model("llama")), load_recipe(str(tmp_path / "one.yaml")), tmp_path / "out", CPU)
    kl = read_manifest(tmp_path / "out").quality.mean_kld  # type: ignore[union-attr]
    flags = ("--bits", "6", "--measured", tmp_path / "out", "--out", tmp_path / "two.yaml")
    assert run(allocate_command, file, *flags) == 0
    second = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert second["predicted_kl"] == pytest.approx(kl)
    assert second["corrected_by"]["W4A16"] == pytest.approx(kl / first["predicted_kl"])


def test_a_cache_in_fp8_is_part_of_what_is_predicted(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    flags = [flag for flag in FLAGS if flag != "kv_cache.dtype=none"]
    flags[flags.index("--tokens") - 1 : flags.index("--tokens")] = []  # the --set that it had
    flags += [
        "--set",
        "kv_cache.skip_layers=[1]",
        "--candidates",
        "W4A16",
        "--out",
        str(tmp_path / "out.json"),
    ]
    assert run(sensitivity_command, tiny_model("llama"), *flags) == 0
    found = read_sensitivity(tmp_path / "out.json")
    assert found.fp8_layers == (0, 2)
    one = best(found, ["W4A16"], bits=4)
    weights = sum(record.choices["W4A16"].kl for record in found.decisions if record.modules)
    caches = {record.layer: record.choices["fp8"].kl for record in found.decisions if not record.modules}
    assert one.kl == pytest.approx(weights + caches[0] + caches[2])
    assert one.bits == 4
    assert "fp8" not in one.counts
    quantize(str(tiny_model("llama")), _recipe_of(one, tmp_path), tmp_path / "out", CPU)
    again, manifest = of_checkpoint(found, tmp_path / "out")
    assert manifest.quality.kv_cache_included
    assert again.kl == pytest.approx(one.kl)


def _recipe_of(one: Assignment, directory: Path) -> Recipe:
    file = directory / "recipe.yaml"
    file.write_text(recipe_text(one, "4 bits"))
    return load_recipe(str(file))


def test_a_page_and_tables_stand_beside_the_numbers(measured: dict[str, Path]) -> None:
    page = measured["qwen3_moe"].with_name("qwen3_moe.json.html").read_text()
    check_page(page)
    for word in ("mlp.experts", "W8A8", "head", "kv_cache"):
        assert word in page


def test_a_dry_run_forecasts_and_writes_nothing(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(sensitivity_command, tiny_model("llama"), *FLAGS, "--dry-run", "--stream-memory-gib", "0") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["streams_bytes"] == report["run_disk_bytes"] == 2 * 512 * 128 * 2 * 4
    assert report["memory_bound_bytes"] > 1e9
    assert report["seconds_here"] > 0
    assert report["decisions"] == 3 * 5
    assert not list(tmp_path.iterdir())


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "scheme": (("--candidates", "W4A17"), "W4A17"),
    "twice": (("--candidates", "W4A16,W4A16"), "different schemes"),
    "group": (("--candidates", "W4A16:96"), "W4A16:96"),
    "method": (("--candidates", "W4A16:32:optq"), "gptq"),
    "none": (("--candidates", "none:32"), "neither group size nor methods"),
    "tokens": (("--tokens", "0"), "--tokens"),
    "passes": (("--set", 'passes=[{"prune_experts": {"prune_ratio": 0.5}}, "quantize"]'), "only pass"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_runs(
    tiny_model: Callable[[str], Path], tmp_path: Path, case: str
) -> None:
    flags, words = REFUSED[case]
    with pytest.raises(InputError, match=words) as refusal:
        run(sensitivity_command, tiny_model("qwen3_moe"), *FLAGS, *flags, "--out", tmp_path / "out.json")
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_too_little_text_and_odd_families_are_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps({"input_ids": [[number] * 64 for number in range(6)]}))
    flags: tuple[str | Path, ...] = ("--set", f"calibration.token_ids={ids}", "--out", tmp_path / "out.json")
    with pytest.raises(InputError, match="as many again"):
        run(sensitivity_command, tiny_model("llama"), *FLAGS, *flags)
    with pytest.raises(InputError, match="more than hidden states"):
        run(sensitivity_command, tiny_model("gemma3n_text"), *FLAGS, "--out", tmp_path / "out.json")
    with pytest.raises(InputError, match="directory that exists"):
        run(sensitivity_command, tiny_model("llama"), *FLAGS, "--out", tmp_path / "no" / "out.json")
    assert [path.name for path in tmp_path.iterdir()] == ["ids.json"]


ALLOCATE: dict[str, tuple[tuple[str, ...], str]] = {
    "no budget": ((), "--bits 4.5"),
    "too few bits": (("--bits", "2"), "3 is the least"),
    "too few bytes": (("--bytes", "1KB"), "--bytes"),
    "no size": (("--bytes", "eighty"), "such as 80MB"),
    "unknown candidate": (("--bits", "4", "--candidates", "W5A16"), "was not measured"),
}


@pytest.mark.parametrize("case", ALLOCATE)
def test_budgets_that_cannot_be_met_are_refused(measured: dict[str, Path], tmp_path: Path, case: str) -> None:
    flags, words = ALLOCATE[case]
    with pytest.raises(InputError, match=words):
        run(allocate_command, measured["llama"], *flags, "--out", tmp_path / "out.yaml")
    assert not list(tmp_path.iterdir())


def test_files_that_hold_no_sensitivities_are_refused(measured: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    data = json.loads(measured["llama"].read_text())
    for text, words in (
        ("{", "not JSON"),
        ("[]", "holds no sensitivities"),
        (json.dumps(data | {"lowbit_sensitivity": 9}), "version 9"),
        (json.dumps(data | {"decisions": 3}), "decisions"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=words):
            run(allocate_command, file, "--bits", "4", "--out", tmp_path / "out.yaml")
    kept = tmp_path / "kept.yaml"
    kept.write_text("edited by hand")
    with pytest.raises(InputError, match="there already"):
        run(allocate_command, measured["llama"], "--bits", "4", "--out", kept)
    assert kept.read_text() == "edited by hand"


def test_a_checkpoint_of_another_base_corrects_nothing(
    measured: dict[str, Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = load_recipe("rtn-g64", tuple(part for part in FLAGS[1:-2:2] if "=" in part))
    quantize(str(tiny_model("qwen2")), recipe, tmp_path / "out", CPU)
    with pytest.raises(InputError, match="the same base"):
        of_checkpoint(read_sensitivity(measured["llama"]), tmp_path / "out")


def test_the_document_comes_back_as_it_was(measured: dict[str, Path]) -> None:
    found = read_sensitivity(measured["llama"])
    assert Sensitivity.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(
    ("text", "size"), [("80MB", 8e7), ("4.5 GiB", 4.5 * 2**30), ("1000", 1000.0), ("1kb", 1e3)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: float) -> None:
    assert size_of(text) == size
