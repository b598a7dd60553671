"""What rules may say of zeros: options, order, and widths that have the pattern; and what a dry run says of them."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.quantize.small_runs import SMALL_FLAGS, recipe_of, recipe_with
from tests.tiny_models import write_tiny_model

from lowbit_core.cli import main
from lowbit_core.strict_yaml import strict_load
from lowbit_quantize.check.preflight import dry_run, table
from lowbit_quantize.methods.sparsity import NofM, Ratio
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.plan import make_plan
from lowbit_quantize.recipe import load_recipe


def rule(methods: Any, scheme: str = "W4A16", match: str = "*") -> dict[str, Any]:
    size = {"group_size": 32} if scheme == "W4A16" else {}
    return {"match": match, "scheme": scheme, **size, "methods": methods}


def refused(model: Path, rules: list[dict[str, Any]], out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a run that is refused before it writes anything."""
    command = ["quantize", "--model", str(model), "--recipe", "gptq-g64", "--out", str(out), *SMALL_FLAGS]
    assert main([*command, "--set", f"modules={json.dumps(rules)}"]) == 2
    assert not out.exists()
    shown = capsys.readouterr().err.splitlines()
    lines = [
        line for line in shown if "error" in line
    ]  # beside what is told of a model that is found by running it
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("methods", "scheme", "says"),
    [
        (["sparsegpt", "awq"], "W4A16", "awq scales inputs, and sparsegpt chooses its mask .* write [awq, sparsegpt]"),
        (["wanda", "awq", "gptq"], "W4A16", "write [awq, wanda, gptq]"),
        (["gptq", "sparsegpt"], "W4A16", "gptq only quantizes, so it stands last"),
        (["sparsegpt", "wanda", "gptq"], "W4A16", "sparsegpt and wanda each choose the weights that become zero"),
        (["sparsegpt", "gptq"], "none", "so one method that changes weights all the same may go"),
        (["awq"], "none", "scheme none quantizes nothing"),
        (["awq", "sparsegpt"], "none", "(magnitude, wanda, sparsegpt, compensate) and no other"),
        ([{"gptq": {"sparsity": 0.5}}], "W4A16", "gptq has no options; write its name alone"),
        ([{"sparsegpt": {"sparsity": "3:4"}}], "none", "allowed are 2:4, 4:8"),
        ([{"sparsegpt": {"sparsity": 1.0}}], "none", "allowed are 2:4, 4:8"),
        ([{"sparsegpt": {"ratio": 0.5}}], "none", "ratio"),
        (["sparsgpt"], "none", "did you mean sparsegpt"),
        ([{"sparsegpt": {}, "gptq": {}}], "W4A16", "a method is its name, or `name: {option: value}`"),
    ],
)  # fmt: skip
def test_methods_that_do_not_go_together_are_refused_in_one_line(
    methods: Any,
    scheme: str,
    says: str,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = refused(tiny_model("llama"), [rule(methods, scheme)], tmp_path / "out", capsys)
    assert all(part in line for part in says.split(" .* "))


def test_inputs_that_no_pattern_divides_are_refused_and_a_ratio_takes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_model(tmp_path / "model", "llama", intermediate_size=130)
    line = refused(model, [rule(["wanda"], "none")], tmp_path / "out", capsys)
    assert "wanda with sparsity 2:4 does not fit the 130 inputs of model.layers.0.mlp.down_proj" in line
    assert "they are no multiple of 4; give a ratio, such as sparsity: 0.5" in line
    plan = make_plan(find_model(str(model)), recipe_with(rule({"wanda": {"sparsity": 0.5}}, "none")))
    assert {entry.pruner.sparsity for entry in plan.modules.values() if entry.pruner} == {Ratio(0.5)}


def test_a_pattern_needs_no_quotes(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("modules: [{match: '*', scheme: none, methods: {sparsegpt: {sparsity: 4:8}}}]\n")
    plan = make_plan(find_model(str(tiny_model("llama"))), load_recipe(str(file)))
    assert {entry.pruner.sparsity for entry in plan.modules.values() if entry.pruner} == {NofM(4, 8)}
    assert strict_load("a: 2:4\nb: 12:30:45\nc: 0x1f\nd: 0o17\ne: 1_000\nf: 1e3\ng: -4.5\nh: 190:20:30.15") == {
        "a": "2:4", "b": "12:30:45", "c": 31, "d": "0o17", "e": 1000, "f": "1e3", "g": -4.5, "h": "190:20:30.15",
    }  # fmt: skip


def test_a_recipe_is_written_as_it_was_read() -> None:
    methods = ["awq", {"sparsegpt": {"sparsity": 0.5}}, "gptq"]
    recipe = recipe_with(rule(methods))
    assert recipe.model_dump(mode="json")["modules"][0]["methods"] == methods


def test_a_dry_run_says_who_gains_and_that_bytes_stay(
    tiny_model: Callable[[str], Path],
) -> None:
    model = str(tiny_model("qwen3_moe"))
    rules = (
        rule(["sparsegpt"], "none", "*.self_attn.*"),
        rule([{"wanda": {"sparsity": 0.5}}], "none", "*.experts.*"),
    )
    report = dry_run(model, recipe_with(*rules), 24.0, 1 << 30)
    plain = dry_run(model, recipe_with(passes=[{"prune_experts": {"keep_experts": 8}}]), 24.0, 1 << 30)
    assert report["tensor_bytes"] == plain["tensor_bytes"]
    found = {one["sparsity"]: one for one in report["sparsity"]}
    assert (found["2:4"]["method"], found["2:4"]["bytes_saved"]) == ("sparsegpt", 0)
    assert "TensorRT" in found["2:4"]["gains"]
    assert "TensorRT" not in found["0.5"]["gains"]
    assert all("gains nothing" in one["gains"] for one in found.values())
    shown = StringIO()
    Console(file=shown, width=600).print(table(report))
    assert "so no bytes are saved" in shown.getvalue()
    assert "TensorRT" in shown.getvalue()


def test_the_bundled_recipe_fits_a_model_of_its_groups(tiny_model: Callable[[str], Path]) -> None:
    plan = make_plan(find_model(str(tiny_model("llama"))), recipe_of("sparse24-gptq-g64"))
    assert {entry.pruner.sparsity for entry in plan.modules.values() if entry.pruner} == {NofM(2, 4)}
    assert {entry.quantizer.name for entry in plan.modules.values()} == {"gptq"}
